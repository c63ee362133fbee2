"""The result of `explain`: rows, their summary, and how they are shown."""

from __future__ import annotations

import dataclasses
import fnmatch
import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .. import last_call
from ..backends import native
from ..functional.checks import shown
from .folding import fold, without_prefix
from .suggestions import suggestion_for

FUSED = "fused"
_HEAD = ("module", "modules", "runs", "backend", "group", "reason")
_GATED_LAYER = "LoraGatedMLP"


@dataclass(frozen=True)
class Row:
    """What is known of one LoRA module.

    module: its name in the model.
    layer: the layer that serves it where it is fused (`LoraLinear`, `LoraGatedMLP`, ...), else its class.
    fused: whether its next call is computed by this kernel.
    backend: who computes it: "native", "triton" or "torch"; of experts "triton", "grouped_mm", which is torch's, or
        "reference", a product an expert; "fused delta" where the base module's own forward makes the product, for the
        `reason`, and the delta is fused; "native, compiled" and its kind in a graph of torch.compile.
    group: the modules of one input that are computed together; for projections of a gated MLP that is one Function the
        MLP's name; "single"; or "after the first pass", since what shares an input is seen when the model runs. None
        of linears in a graph, whose compiler merges those of one input.
    reason: why PEFT's own forward runs, or the base module's.
    mlp: why the gated MLP that it is a projection of is not one Function.
    last: what its last call ran, "fused", "in a graph of torch.compile", which runs no Python that could tell, or the
        reason why PEFT's own forward did; None where it was not called yet.
    parameters: how many the adapters on it have.
    calls: of a recording (`explain(model, calls=calls)`), ("fused", number) and (reason, number); None without one.
    """

    module: str
    layer: str
    fused: bool
    backend: str | None = None
    group: str | None = None
    reason: str | None = None
    mlp: str | None = None
    last: str | None = None
    parameters: int = 0
    calls: tuple[tuple[str, int], ...] | None = None

    @property
    def suggestion(self) -> str | None:
        """What to do about the reason, where something can be done."""
        return None if self.reason is None else suggestion_for(self.reason)


class Explanation(Sequence[Row]):
    """The rows of `explain`, one a LoRA module. Printed, or shown in a notebook, it is a summary and a table in which
    modules that differ in numbers of their names alone share a row."""

    def __init__(self, rows: Sequence[Row]):
        if not isinstance(rows, Sequence) or not all(isinstance(row, Row) for row in rows):
            raise TypeError(f"rows: {shown(rows)}, expected a list of Rows, as explain(model) makes it")
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        found = self._rows[index]
        return Explanation(found) if isinstance(index, slice) else found

    def filter(
        self, pattern: str = "*", *, fused: bool | None = None, backend: str | None = None, reason: str | None = None
    ) -> Explanation:
        """The rows of modules whose name matches `pattern` (of fnmatch: `*.self_attn.*`), which are fused or not, whose
        backend begins with `backend`, and whose notes contain `reason`. Raises TypeError for anything else."""
        for name, value in (("pattern", pattern), ("backend", backend or ""), ("reason", reason or "")):
            if not isinstance(value, str):
                raise TypeError(f"{name}: {shown(value)}, expected a str")
        if fused is not None and not isinstance(fused, bool):
            raise TypeError(f"fused: {shown(fused)}, expected True, False or None")
        return Explanation(
            [
                row
                for row in self._rows
                if fnmatch.fnmatchcase(row.module, pattern)
                and fused in (None, row.fused)
                and (backend is None or (row.backend or "").startswith(backend))
                and (reason is None or reason in _notes(row))
            ]
        )

    def to_dict(self) -> dict:
        """All of it in types that JSON has: the counts of the summary, `reasons` with their number and suggestion,
        `rows`."""
        fused = [row for row in self._rows if row.fused]
        return dict(
            modules=len(self),
            fused=len(fused),
            parameters=sum(row.parameters for row in self._rows),
            fused_parameters=sum(row.parameters for row in fused),
            backends=dict(Counter(row.backend for row in fused)),
            reasons=[
                dict(reason=reason, modules=number, suggestion=suggestion_for(reason))
                for reason, number in _reasons(self._rows).most_common()
            ],
            gated_mlps=len(_fused_mlps(self._rows)),
            other_mlps=[dict(reason=reason, mlps=number) for reason, number in _other_mlps(self._rows).most_common()],
            rows=[dataclasses.asdict(row) | dict(suggestion=row.suggestion) for row in self._rows],
        )

    def headline(self) -> str:
        """How much is fused, in one line."""
        text = self._share()
        mlps = len(_fused_mlps(self._rows))
        if mlps:
            text += f"; {mlps} gated MLPs, one Function each"
        unfused = Counter(row.reason for row in self._rows if not row.fused)
        return text + "".join(f"; PEFT's own forward: {number}, {reason}" for reason, number in unfused.most_common(3))

    def summary(self) -> list[str]:
        """Lines: how much is fused, each reason with its number of modules and what to do, and the MLPs that are not
        one Function."""
        found = self.to_dict()
        lines = [self._share()]
        if not native.available:
            lines.append("no native ops in this variant: products are torch's, passes over memory Triton's on a GPU")
        for each in found["reasons"]:
            lines.append(f"{each['modules']} x {each['reason']}")
            if each["suggestion"]:
                lines.append(f"    {each['suggestion']}")
        if found["gated_mlps"] or found["other_mlps"]:
            lines.append(f"gated MLPs that are one Function: {found['gated_mlps']}")
        lines += [f"    {each['mlps']} not: {each['reason']}" for each in found["other_mlps"]]
        return lines

    def _share(self) -> str:
        if not self._rows:
            return "no LoRA modules"
        fused = [row for row in self._rows if row.fused]
        ours, all_of_it = (sum(row.parameters for row in rows) for rows in (fused, self._rows))
        text = (
            f"{len(fused)} of {len(self)} LoRA modules fused, {ours / max(all_of_it, 1):.1%} of the adapter parameters"
        )
        backends = ", ".join(f"{name} {number}" for name, number in Counter(row.backend for row in fused).items())
        return f"{text} ({backends})" if backends else text

    def __str__(self) -> str:
        if not self._rows:
            return self._share()
        cells = [_HEAD, *self._folded()]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells]
        return "\n".join([*self.summary(), "", *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Sequence[str]) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        summary = html.escape("\n".join(self.summary()))
        body = "".join(line("td", cells) for cells in self._folded())
        return f"<pre>{summary}</pre><table><thead>{line('th', _HEAD)}</thead><tbody>{body}</tbody></table>"

    def _folded(self) -> list[tuple[str, ...]]:
        """The table's lines, in the order in which the model has the modules."""
        shown = without_prefix([row.module for row in self._rows])
        lines: dict[tuple[str, ...], list[str]] = {}
        for row, name in zip(self._rows, shown):
            words = ".".join(word for word in name.split(".") if not word.isdigit())
            runs = f"{row.layer}, fused" if row.fused else "PEFT's own forward"
            group = (row.group or "-").rpartition(".")[2] if row.layer.startswith(_GATED_LAYER) else row.group or "-"
            lines.setdefault((words, runs, row.backend or "-", group, _notes(row)), []).append(name)
        return [
            (pattern or "(itself)", str(len(names)) if number == 0 else "", *key[1:])
            for key, names in lines.items()
            for number, pattern in enumerate(fold(names))
        ]


def _notes(row: Row) -> str:
    """The reason, and what else differs from what one would expect."""
    notes = [row.reason] if row.reason else []
    if row.mlp:
        notes.append(f"its MLP is not one Function: {row.mlp}")
    if row.last not in (None, last_call.TRACED, FUSED if row.fused else row.reason):
        notes.append(f"last call: {row.last}")
    if row.calls is not None:
        none = "none outside of its graph" if row.last == last_call.TRACED else "none"
        notes.append("calls: " + (", ".join(_count(row, *each) for each in row.calls) or none))
    return "; ".join(notes)


def _count(row: Row, what: str, number: int) -> str:
    if what == FUSED:
        return f"{number} fused"
    return f"{number} PEFT's own" + ("" if what == row.reason else f" ({what})")


def _reasons(rows: Sequence[Row]) -> Counter[str]:
    return Counter(row.reason for row in rows if row.reason)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _fused_mlps(rows: Sequence[Row]) -> set[str | None]:
    return {row.group for row in rows if row.fused and row.layer.startswith(_GATED_LAYER)}


def _other_mlps(rows: Sequence[Row]) -> Counter[str]:
    """How many MLPs are not one Function, by reason."""
    return Counter(reason for _, reason in {(_parent(row.module), row.mlp) for row in rows if row.mlp})
