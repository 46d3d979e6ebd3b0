"""One measured figure, and the table of all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """`share` is of the machine's own rate in the same run, `aim` what it should be."""

    name: str
    dtype: str
    mode: str
    value: float
    unit: str
    share: float | None = None
    aim: str = ""
    met: bool | None = None
    note: str = ""


def table(figures: list[Figure]) -> str:
    """Markdown."""
    lines = [
        "| figure | dtype | mode | value | share of the machine | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in figures:
        share = "" if f.share is None else f"{100 * f.share:.0f} %"
        met = {None: "", True: "met", False: "**missed**"}[f.met]
        lines.append(
            f"| {f.name} | {f.dtype} | {f.mode} | {_number(f.value)} {f.unit} | {share} "
            f"| {f.aim} | {met} {f.note} |"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
