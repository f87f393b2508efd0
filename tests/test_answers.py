"""Which runs answer a published number, by conditions as numbers, and the verdict rules at their edges."""
import math

import numpy as np
import pytest

from lab import answers, own, stats
from lab.answers import Table, answer

INF = math.inf
RUN = {"model": "mlp", "loss": "ce", "p": 59, "train_frac": 0.4, "block": 16, "seed0": 0, "tau": 1, "gamma": None, "lr": 1e-3, "weight_decay": 1,
       "dtype": "float32", "budget_steps": 60_000, "t_mem_step": 175, "norm_at_grok": 55.0}   # whole numbers are read back from runs.csv as such
ROW = {"id": "x", "quantity": "q", "statistic": "T_grok", "model": "mlp", "task": "add", "p": 59, "train_frac": 0.4, "loss": "ce", "arm": "clamp",
       "rho": 1.15, "tau": None, "lr": 1e-3, "wd": 1.0, "dtype": None, "block": None, "n_seeds": None, "value": 1000.0, "lo": None, "hi": None,
       "printed": "1000", "w_c": None}


def cell(name: str, *times: float | None, **conditions: object) -> list[dict]:
    return [{**RUN, "arm": "clamp", "rho": 1.15, "cell": name, "member": m, "t_grok_step": t, "censored": int(t is None), **conditions}
            for m, t in enumerate(times)]


def answered(runs: list[dict], *rows: dict, networks: str = "fresh") -> dict[str, dict]:
    runs = runs if networks == "fresh" else [{**run, "networks": own.label(rows[0])} for run in runs]
    table = Table(runs, networks=networks)
    answer(table, rows, {})
    return table.claims


# ---------------------------------------------------------------- conditions

@pytest.mark.parametrize("conditions", [
    {"rho": 1.154}, {"rho": 1.15 + 1e-9}, {"lr": 1.0001e-3}, {"p": 61}, {"weight_decay": 0.5}, {"train_frac": 0.4004}, {"tau": 1.3}, {"loss": "mse"},
    {"model": "transformer"}, {"arm": "rescale"}, {"gamma": 0.3}, {"held_unembed": 9.0}, {"task": "sub"}])
def test_a_run_at_another_condition_answers_nothing(conditions: dict) -> None:
    assert not answered(cell("near", 1000, 1000, **conditions), ROW)
    assert answered([*cell("near", 2000, 2000, **conditions), *cell("exact", 1000, 1000)], ROW)["x"]["ours"] == 1000


def test_two_doses_that_print_alike_are_two_cells() -> None:
    rows = [{**ROW, "id": "a"}, {**ROW, "id": "b", "rho": 1.154}]
    claims = answered([*cell("one", 1000, 1000), *cell("other", 2000, 2000, rho=1.154)], *rows)
    assert {key: claim["ours"] for key, claim in claims.items()} == {"a": 1000, "b": 2000}


def test_precision_is_a_condition_where_the_row_states_it_and_float32_goes_first_where_not() -> None:
    runs = [*cell("wide", 2000, 2000, dtype="float64"), *cell("narrow", 1000, 1000)]
    assert answered(runs, ROW)["x"]["ours"] == 1000 and answered(runs[:2], ROW)["x"]["ours"] == 2000
    assert answered(runs, {**ROW, "dtype": "float64"})["x"]["ours"] == 2000 and not answered(runs[2:], {**ROW, "dtype": "float64"})


def test_the_block_is_a_condition_of_the_papers_own_networks_alone() -> None:
    """Fresh networks are others in any block; how many of them it takes is the published number's."""
    row = {**ROW, "block": 8, "n_seeds": 8}
    runs = cell("c", *[1000] * 4)
    assert answered(runs, row)["x"]["verdict"] == "REPLICATED" and answered(runs[:3], row)["x"]["verdict"] == "INCONCLUSIVE"
    assert answered([*runs, *cell("own", *[2000] * 8, block=8)], row)["x"]["ours"] == 2000
    assert not answered(runs, row, networks="published") and answered(runs, {**row, "block": 16}, networks="published")


def test_a_group_held_alone_answers_rows_of_that_group_only() -> None:
    group = {"rho": 1.3, "held_norm": None, "held_mlp": None, "held_unembed": 9.0}
    row = {**ROW, "rho": 1.3, "group": "unembed"}
    assert answered(cell("u", 1000, 1000, **group), row) and not answered(cell("u", 1000, 1000, **group), {**row, "group": "mlp"})
    assert not answered(cell("both", 1000, 1000, **group | {"held_mlp": 20.0}), row)
    assert not answered(cell("total", 1000, 1000, rho=1.3, held_norm=70.0), row)


def test_read_outs_of_one_cell() -> None:
    runs = cell("c", 1000, 1200, None, norm_at_mem=1.0)
    runs[0]["norm_at_grok"], runs[1]["norm_at_grok"], runs[2]["norm_at_grok"] = 50.0, 52.0, None
    for m, run in enumerate(runs):
        run["collapse32_max"] = 0.1 * m
    log = [{"cell": "c", "member": m, "step": s, "logit_scale": s / 100 + m} for m in range(3) for s in (800, 1000, 1200)]
    table = Table(runs, log)
    rows = [{**ROW, "id": statistic, "statistic": statistic} for statistic in ("T_grok", "T_mem", "L", "W_c", "collapse32_max", "alpha")]
    answer(table, rows, {})
    ours = {key: claim["ours"] for key, claim in table.claims.items()}   # alpha is no read-out of one cell
    assert ours == {"T_grok": 1200, "T_mem": 175, "W_c": 51, "L": 11, "collapse32_max": pytest.approx(0.1)}   # logged nearest 1100: step 1000


def test_an_experiments_own_statistic_goes_before_the_read_out() -> None:
    table = Table(cell("c", 1000, 1100))
    answer(table, [ROW], {"T_grok": lambda table, row: (("c",), lambda picks: np.full(len(picks), 7.0), "half of it")})
    assert (table.claims["x"]["ours"], table.claims["x"]["why"]) == (7, "half of it") and table.claims["x"]["verdict"] == "INCONCLUSIVE"
    answer(table, [{**ROW, "id": "y"}], {"T_grok": lambda table, row: None})
    assert "y" not in table.claims


def test_every_row_of_the_file_has_its_conditions_as_numbers() -> None:
    rows = answers.published()
    assert len(rows) == 534 and rows["B.fork.p59.ratio"]["value"] == 3.36 and rows["B.fork.p59.ratio"]["lo"] == 3.27
    assert all(row["value"] is not None or row["printed"] for row in rows.values())
    assert all(isinstance(row[key], float) for row in rows.values() for key in ("rho", "lr", "tau", "w_c") if row[key] is not None)
    assert set(answers.published("B.fork.")) == {key for key in rows if key.startswith("B.fork.")}


# ---------------------------------------------------------------- verdicts: fresh networks

SIXTEEN = {**ROW, "value": 100.0, "printed": "100", "n_seeds": 16.0}
NEVER = {**SIXTEEN, "value": None, "printed": "not within 60000"}


@pytest.mark.parametrize("row, ours, n, worst, verdict", [
    (SIXTEEN, (104, 102, 106), 16, 0.0, "REPLICATED"),            # meets 97..103
    (SIXTEEN, (104, 103, 106), 16, 0.0, "REPLICATED"),            # touches it
    (SIXTEEN, (110, 103.001, 116), 16, 0.0, "NOT REPLICATED"),
    (SIXTEEN, (110, 104, 116), 8, 0.0, "NOT REPLICATED"),         # half the published members
    (SIXTEEN, (110, 104, 116), 7, 0.0, "INCONCLUSIVE"),           # fewer
    (SIXTEEN, (100, 99, 101), 8, 0.5, "INCONCLUSIVE"),            # half of a cell is censored
    (SIXTEEN, (100, 99, 101), 8, 0.49, "REPLICATED"),
    (SIXTEEN, (100, 99, INF), 16, 0.4, "INCONCLUSIVE"),           # an end of the interval lies beyond the budget
    (SIXTEEN, (math.nan,) * 3, 16, 0.0, "INCONCLUSIVE"),
    ({**SIXTEEN, "lo": 90.0, "hi": 95.0}, (96, 94, 98), 16, 0.0, "REPLICATED"),
    ({**SIXTEEN, "lo": 90.0, "hi": 93.0}, (96, 94, 98), 16, 0.0, "NOT REPLICATED"),
    ({**SIXTEEN, "value": -100.0}, (-102, -104, -101), 16, 0.0, "REPLICATED"),   # -103..-97
    ({**SIXTEEN, "value": None, "printed": "about 100"}, (100, 99, 101), 16, 0.0, "INCONCLUSIVE"),
    (NEVER, (INF, INF, INF), 16, 1.0, "REPLICATED"),
    (NEVER, (70_000, 65_000, INF), 16, 0.4, "REPLICATED"),
    (NEVER, (59_000, 55_000, 60_000), 16, 0.0, "REPLICATED"),     # touches it
    (NEVER, (50_000, 45_000, 59_975), 16, 0.0, "NOT REPLICATED"),
    (NEVER, (INF, INF, INF), 7, 1.0, "INCONCLUSIVE"),
])
def test_replicated(row: dict, ours: tuple, n: int, worst: float, verdict: str) -> None:
    assert stats.replicated(row, ours, n, 0, "", worst)["verdict"] == verdict


def test_what_is_missing_of_a_fit_makes_it_inconclusive() -> None:
    table = Table(cell("c", *[1000] * 16))
    table.claim({**SIXTEEN, "value": 1000.0}, ("c",), table.T("c"), "fitted to 3 doses")
    assert table.claims["x"]["verdict"] == "INCONCLUSIVE" and table.claims["x"]["why"] == "fitted to 3 doses"


@pytest.mark.parametrize("budget, verdict", [(60_000, "REPLICATED"), (59_975, "INCONCLUSIVE")])
def test_censored_short_of_the_papers_budget_says_nothing(budget: int, verdict: str) -> None:
    """The paper's median is later than 60000 steps: runs that end before that cannot tell."""
    claim = answered(cell("c", *[None] * 16, budget_steps=budget), NEVER)["x"]
    assert claim["verdict"] == verdict and claim["n_censored"] == 16 and claim["ours"] is None


def test_paper_bs_own_networks_are_no_fresh_ones() -> None:
    """B drew its networks from seed 0 of the CPU's generator, as `--seed0 0` does; A drew on a CUDA card."""
    for name, seed0, verdict in (("B.x", 0, "INCONCLUSIVE"), ("B.x", 1000, "REPLICATED"), ("A.x", 0, "REPLICATED")):
        assert answered(cell("c", *[1000] * 16, seed0=seed0), {**ROW, "id": name})[name]["verdict"] == verdict


def test_a_time_off_the_published_one_is_parted_into_the_norms_share_and_the_rest() -> None:
    """exp(7.64 * 1.15 * 0.02) = 1.192 by the norm; 1.3 / 1.192 = 1.091 by what is left."""
    why = answered(cell("c", *[1300] * 16, w_c=51.0), {**ROW, "w_c": 50.0})["x"]["why"]
    assert why.endswith("our W_c is +2.0% off the paper's, worth +19% of T_grok by the delay law; seeds and protocol +9%")
    assert "worth" not in answered(cell("c", *[1300] * 16, w_c=51.0, tau=1.3), {**ROW, "w_c": 50.0, "tau": 1.3})["x"]["why"]


# ---------------------------------------------------------------- verdicts: the papers' own networks

@pytest.mark.parametrize("row, ours, n, censored, verdict", [
    (SIXTEEN, 100.4, 16, 0, "REPRODUCED"),                                    # its printed digits
    (SIXTEEN, 101.0, 16, 0, "REPRODUCED"),                                    # within 1%
    (SIXTEEN, 101.01, 16, 0, "NOT REPRODUCED"),
    (SIXTEEN, 100.0, 15, 0, "PARTLY RUN"),
    ({**SIXTEEN, "value": 0.02, "printed": "0.02"}, 0.0249, 16, 0, "REPRODUCED"),   # 0.02 as printed, 25% away
    ({**SIXTEEN, "value": 0.02, "printed": "0.02"}, 0.0251, 16, 0, "NOT REPRODUCED"),
    ({**SIXTEEN, "value": 0.0, "printed": "0.00"}, 0.004, 16, 0, "REPRODUCED"),
    ({**SIXTEEN, "value": 3e-6, "printed": "3e-6"}, 3.1e-6, 16, 0, "NOT REPRODUCED"),   # digits of an exponent are no decimals
    (SIXTEEN, INF, 16, 16, "NOT REPRODUCED"),
    ({**SIXTEEN, "value": None, "printed": "about 100"}, 100.0, 16, 0, "NOT REPRODUCED"),
    (NEVER, math.nan, 16, 16, "REPRODUCED"),                                  # median over those that grok: none does
    (NEVER, 40_000.0, 16, 8, "REPRODUCED"),                                   # of the half that does: the cell's is later than the budget
    (NEVER, 40_000.0, 16, 7, "NOT REPRODUCED"),
    ({**NEVER, "statistic": "T_grok_min"}, 40_000.0, 16, 15, "NOT REPRODUCED"),   # the earliest is no median
    ({**NEVER, "statistic": "T_grok_min"}, INF, 16, 16, "REPRODUCED"),
])
def test_reproduced(row: dict, ours: float, n: int, censored: int, verdict: str) -> None:
    assert stats.reproduced(row, (ours, math.nan, math.nan), n, censored)["verdict"] == verdict


def test_the_papers_networks_take_the_papers_median() -> None:
    """Over the members that grok; fresh networks count censored ones as later."""
    runs = cell("c", 1000, 1010, 1020, None)
    row = {**ROW, "value": 1010.0, "printed": "1010", "n_seeds": 4.0}
    assert answered(runs, row, networks="published")["x"]["ours"] == 1010 and answered(runs, row)["x"]["ours"] == 1015
    assert answered(runs, row, networks="published")["x"]["verdict"] == "REPRODUCED"
    assert answered(runs, {**row, "n_seeds": None, "block": None}, networks="published")["x"]["why"] == "4 of 16 members"


def test_a_summary_has_both_answers_to_a_number() -> None:
    tables = []
    for networks, t in (("published", 1000), ("fresh", 1100)):
        label = own.label(ROW) if networks == "published" else "fresh"
        tables.append(Table(cell("c", *[t] * 16, networks=label), networks=networks))
        answer(tables[-1], [ROW], {})
        tables[-1].finding("f", "q", ("c",), 1.0)
    (claim,), findings = answers.merged(tables)
    assert (claim["id"], claim["published"], claim["reproduced"]["ours"], claim["replicated"]["ours"]) == ("x", 1000, 1000, 1100)
    assert (claim["reproduced"]["verdict"], claim["replicated"]["verdict"]) == ("REPRODUCED", "NOT REPLICATED")
    assert [finding.get("networks") for finding in findings] == ["published", None]
    (claim,), _ = answers.merged(tables[1:])
    assert "reproduced" not in claim
