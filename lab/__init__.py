"""The bench around the experiments: the trainer, output folders, statistics, figures. Nobody needs to read it to write an experiment."""
