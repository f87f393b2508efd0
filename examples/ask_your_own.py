"""A question of one's own: does a norm held below the critical one help multiplication as it helps addition, and what is inside the networks?

    python examples/ask_your_own.py               about a minute on 2 cores; or cell by cell in an editor that knows `# %%`
"""
# %% three conditions, two networks each; the trained ones go to FOLDER
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] if "__file__" in globals() else Path.cwd()))
from common import Cell, load, train

FOLDER = Path("results/ask_your_own")
SAME = {"p": 59, "members": range(2), "lr": 8e-3, "after_grok": 400}
HELD = {"rho": 0.85, "w_c": 54.5, **SAME}
CELLS = [Cell("addition", **SAME), Cell("addition_held", **HELD), Cell("multiplication_held", task="mul", **HELD)]
result = train(CELLS, weights=FOLDER)
print(result.table())

# %% one figure: test accuracy of every network
for i, cell in enumerate(CELLS):
    for member in cell.members:
        mine = [row for row in result.trajectories if (row["cell"], row["member"]) == (cell.name, member)]
        plt.plot([row["step"] for row in mine], [row["test_accuracy"] for row in mine], "osD"[i], ls="-", color=f"C{i}", ms=3,
                 label=cell.name.replace("_", " ") if member == 0 else None)
plt.xlabel("step")
plt.ylabel("accuracy on the pairs never trained on")
plt.legend()
plt.savefig(FOLDER / "accuracy.png", dpi=120)


# %% the trained weights, opened: which frequencies the embedding has, and what five of them explain of the logits
def spectrum(E: torch.Tensor) -> np.ndarray:
    """Share of each frequency 1 .. p // 2 in the power of `E (p, d)` over its p inputs."""
    power = torch.fft.rfft(E.double(), dim=0)[1:].abs().square().sum(1)
    return (power / power.sum()).numpy()


def explained(logits: torch.Tensor, frequencies: list[int]) -> float:
    """Share of the variance of `logits (p, p, p)` of a, b and class c in the waves cos and sin 2 pi k (a + b - c) / p."""
    p, values = len(logits), torch.arange(len(logits))
    s = (values[:, None, None] + values[None, :, None] - values[None, None, :]) % p
    of_s = torch.zeros(p, dtype=torch.float64).index_add(0, s.flatten(), logits.double().flatten()) / p**2     # mean logit at each a + b - c
    wave = torch.fft.fft(of_s).abs().square() / p**2
    return float(2 * wave[frequencies].sum() / logits.double().var(correction=0))


saved = load(FOLDER / "addition.safetensors")
p = saved.conditions["p"]
a, b = torch.arange(p * p) // p, torch.arange(p * p) % p
for member, moments in saved.modules.items():
    for moment, network in moments.items():
        with torch.no_grad():
            logits = network(a, b)
        right = float((logits.argmax(1) == saved.labels.flatten()).double().mean())
        shares = spectrum(network.E.detach())
        five = sorted((np.argsort(shares)[-5:] + 1).tolist())
        print(f"member {member} at {moment}: {100 * right:.0f}% right, frequencies {' '.join(map(str, five))} have "
              f"{100 * np.sort(shares)[-5:].sum():.0f}% of the embedding and explain "
              f"{100 * explained(logits.view(p, p, -1), five):.0f}% of the logits")
