"""Norm up, temperature back: what part of the delay by the norm the logit scale L accounts for (arXiv 2606.18465, section 4)."""
import itertools
from collections.abc import Sequence

from lab.answers import Table


def findings(table: Table, cells: Sequence[str], early: int = 0, law: tuple[str, str] = ("", "")) -> None:
    """Of the baseline, the raised norm at tau 1 and that at further temperatures, by tau: the recovery fraction in its forms, and what norm and
    temperature each do. `early`: a logged step at which L is not yet an outcome; `law`: published numbers of ratio and recovery to tell of."""
    base, up, last = cells[0], cells[1], cells[-1]
    loss, rho, dtype, model = (table.first[up].get(key) for key in ("loss", "rho", "dtype", "model"))
    p, tau, dtype = table.first[base]["p"], table.first[last]["tau"], dtype or "float32"
    about = f"p{p}" if p else f"{table.first[base]['task'].replace(' ', '_')}.rho{rho:g}"
    where, over, cool = f"{loss}.{about}", lambda a, b: lambda picks: a(picks) / b(picks), (up, last)
    table.finding(f"norm_up.{where}", f"median T_grok, rho {rho:g} over 1, tau 1", (up, base), table.ratio(up, base),
                  law=f"p={p}, {loss}: T_grok at rho {rho:g} over rho 1" if law[0] else "", paper=law[0])
    for step, log, joint in itertools.product((None, early) if early else (None,), (False, True), (False, True)):
        told = law[0] and not (step or log or joint)
        table.finding(".".join(["recovery", where, *["early"] * bool(step), *["log"] * log, *["joint"] * joint]),
                      f"recovery fraction on {'log time' if log else 'time'}, L at {f'step {step}' if step else 'grokking'}; interval with the "
                      f"logit {'axis resampled' if joint else 'curve held fixed'}", cells, table.recovery(cells, step, log, joint),
                      law=f"p={p}, {loss}: share of that delay recovered at the logit scale of rho 1" if told else "", paper=law[1])
    if loss == "ce":
        table.finding(f"collapse.{dtype}.{where}.rho{rho:.2f}", f"share of training pairs in collapse in working precision, {model}, trained in "
                      f"{dtype}, tau 1", (up,), table.at(up, dtype.replace("float", "collapse")))
    delay = lambda name, picks: table.median((table.grok[name] - table.mem[name])[picks])  # noqa: E731
    table.finding(f"tau_effect.{where}", f"median T_grok at rho {rho:g}, tau 1 over {tau:g}", cool, table.ratio(up, last))
    table.finding(f"logit_movement.{where}", f"logit scale at rho {rho:g}, tau 1 over {tau:g}", cool, over(table.at(up), table.at(last)))
    table.finding(f"memorisation.{where}", f"median T_mem at rho {rho:g}, tau {tau:g} over 1", cool, over(table.T_mem(last), table.T_mem(up)))
    table.finding(f"delay_share.{where}", "share of the tau effect on T_grok that is in the delay T_grok - T_mem", cool, over(
        lambda picks: delay(up, picks) - delay(last, picks), lambda picks: table.T(up)(picks) - table.T(last)(picks)))
