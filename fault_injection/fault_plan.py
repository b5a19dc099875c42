"""Which faults strike which runs: all of it follows from a seed and a number of faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from fault_injection.kinds import (
    BETWEEN,
    DAMAGES,
    ERRORS,
    LINKS,
    MALFORMED,
    MISMATCHES,
    OPENED,
    PIPES,
    RANK_0_SITES,
    SHARES,
    SITES,
)

INTERVAL = 3
"""Steps between checkpoints of every run."""

BATCH = 8
"""Global batch size of every run."""

KEPT = 3
"""Newest checkpoints that stay."""

SERIES = ((7, 8, 9), (13, 14, 15))
"""Global batches in a row in which the gradient is not a number, where runs have to go back. An interval
between checkpoints ends inside the first series, and before the second; nothing is evaluated at the steps
that are stopped.
"""


@dataclass(frozen=True)
class Layout:
    """Processes and how they share the model.

    Args:
        processes: on this machine.
        tp: tensor-parallel size.
        zero: ZeRO stage.
        precision: as ``train.precision``.
    """

    processes: int
    tp: int
    zero: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.processes} processes, TP {self.tp}, ZeRO-{self.zero}, {self.precision}"

    def arguments(self, micro_batch: int) -> list[str]:
        """Options of a run.

        Args:
            micro_batch: the most sequences of a micro-batch.
        """
        micro_batch = min(micro_batch, BATCH * self.tp // self.processes)
        return [
            "--train.micro_batch_size", str(micro_batch),
            "--parallel.tensor_parallel_size", str(self.tp), "--model.pad_vocab_to_multiple_of", "2",
            "--train.deepspeed_config", f"zero{self.zero}", "--train.precision", self.precision,
        ]  # fmt: skip


LAYOUTS = (
    Layout(2, 1, 2),
    Layout(2, 2, 1),
    Layout(2, 1, 3),
    Layout(2, 1, 1, "bf16"),
    Layout(4, 2, 2),
    Layout(2, 2, 3, "bf16"),
    Layout(2, 2, 2),
    Layout(4, 1, 3),
)
MOVES = (Layout(2, 1, 2), Layout(2, 2, 1), Layout(4, 2, 3), Layout(2, 1, 3), Layout(1, 1, 1))
"""What a run with faults of the kind ``layout`` goes through, in turn."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        number: counts from 1 over the whole plan.
        kind: a key of ``SHARES``.
        after: steps of training after the start at which it strikes; for ``open-error``, opens and reads.
        site: inside a save, or "".
        rank: that it strikes, modulo the number of processes.
        all_ranks: strike all of them.
        variant: what else tells it apart: a signal, a sort of damage, a name.
        amount: seconds (``pause``, delays of ``kill-*``), hours (``clock``), attempts that fail
            (``open-error``).
        batch: global batch behind which it strikes (``stop-between-bad``).
    """

    number: int
    kind: str
    after: int = 1
    site: str = ""
    rank: int = 0
    all_ranks: bool = False
    variant: str = ""
    amount: float = 0.0
    batch: int = 0

    def __str__(self) -> str:
        words = [self.kind, self.variant, self.site and f"at {self.site}"]
        of_rank = self.kind not in BETWEEN or self.kind == "rank-mismatch"
        if of_rank and self.kind not in ("kill-all", "disk-full", "stop-between-bad"):
            words.append("all ranks" if self.all_ranks else f"rank {self.rank}")
        return " ".join(word for word in words if word)


@dataclass
class Scenario:
    """A run and the faults that it goes through. A run that is complete with faults left is followed by
    another.

    Args:
        number: counts from 1.
        layout: of every start, unless faults of the kind ``layout`` change it.
        overlap: as ``train.checkpoint_overlap``.
        on_failure: as ``train.on_checkpoint_failure``.
        steps: of a whole run.
        faults: in their order.
        nan_batches: global batches in which a rank's gradient is not a number, and that rank.
        max_skipped: as ``train.max_skipped_steps``.
    """

    number: int
    layout: Layout
    overlap: bool
    on_failure: str
    steps: int = 30
    faults: list[Fault] = field(default_factory=list)
    nan_batches: dict[int, int] = field(default_factory=dict)
    max_skipped: int = 5

    @property
    def moving(self) -> bool:
        """Whether the layout changes, so that equality is to rounding."""
        return any(fault.kind == "layout" for fault in self.faults)

    @property
    def micro_batch(self) -> int:
        """The most sequences of a micro-batch: another size would draw other dropout masks."""
        return 2 if self.moving else 4

    def __str__(self) -> str:
        layout = "changing layouts" if self.moving else str(self.layout)
        return f"{layout}, checkpoints {'beside' if self.overlap else 'between'} steps"


def make_plan(seed: int, count: int) -> list[Scenario]:
    """Runs and ``count`` faults, drawn from ``seed``."""
    draw = random.Random(seed)
    kinds = _kinds(count)
    draw.shuffle(kinds)
    series = kinds.count("stop-between-bad")
    number = max(4, round((count - series) / 14))
    scenarios = [
        Scenario(
            index + 1,
            LAYOUTS[(index // 2) % len(LAYOUTS)],
            overlap=index % 2 == 0,
            on_failure="stop" if index % 4 == 1 else "continue",
            steps=18 if LAYOUTS[(index // 2) % len(LAYOUTS)].processes > 2 else 30,
        )
        for index in range(number)
    ]
    # Some kinds need runs of their own sort: a small disk, changing layouts, batches that spoil gradients.
    few = [s for s in scenarios[:-2] if s.layout.processes < 4]
    homes = {
        "layout": scenarios[-max(1, number // 20) - (number >= 10) :],
        "disk-full": scenarios[0:3:2] + scenarios[1:2] + scenarios[5::12],
        "nan": [s for s in few if s.number % 6 == 1 or s.number < 4] if number > 12 else few,
        "stop-between-bad": _series_homes(draw, number, series),
    }
    dealt = 0
    turns = dict.fromkeys(SHARES, 0)
    for index, kind in enumerate(kinds):
        if kind in homes:
            home = homes[kind][(turns[kind] if kind == "stop-between-bad" else index) % len(homes[kind])]
        else:
            home, dealt = scenarios[dealt % number], dealt + 1
        # Sites and sorts of damage come in turn, so that none is left out.
        fault = _drawn(draw, index + 1, kind, turns[kind])
        turns[kind] += 1
        if kind == "nan":
            batch = draw.choice([b for b in range(2, home.steps - 2) if b not in home.nan_batches])
            home.nan_batches[batch] = draw.randrange(home.layout.processes)
        home.faults.append(fault)
    for home in homes["stop-between-bad"]:
        behind = [batch for series in SERIES for batch in series[:-1]]
        home.faults = [replace(f, batch=behind[i % len(behind)]) for i, f in enumerate(home.faults)]
    scenarios += homes["stop-between-bad"]
    return _numbered([scenario for scenario in scenarios if scenario.faults])


def _series_homes(draw: random.Random, number: int, count: int) -> list[Scenario]:
    """Runs that have to go back twice: three of them in each scenario, with four faults each."""
    homes = []
    for index in range(-(-count // 12)):
        layout = LAYOUTS[index % len(LAYOUTS)]
        nan = {batch: draw.randrange(layout.processes) for series in SERIES for batch in series}
        homes.append(
            Scenario(
                number + index + 1, layout, index % 2 == 0, "continue", 18, nan_batches=nan, max_skipped=3
            )
        )
    return homes


def short_plan(seed: int) -> list[Scenario]:
    """One fault of every important kind, in a minute; ``seed`` is for the instants of random kills."""
    draw = random.Random(seed)
    beside = Scenario(1, LAYOUTS[0], True, "continue", 24, nan_batches={4: 1})
    between = Scenario(2, LAYOUTS[1], False, "continue", 24)
    beside.faults = [
        Fault(0, "nan"),
        Fault(0, "pause", 2, rank=1, amount=0.5),
        Fault(0, "kill-one", 4, rank=1),
        Fault(0, "damage", variant="bit-flipped"),
        Fault(0, "clock", 1, rank=0, amount=-5.0),
        Fault(0, "kill-in-save", 4, site="before-rename", all_ranks=True),
        Fault(0, "read-error", 2, rank=1),
        Fault(0, "disk-full", 1, variant="mid-write"),
        Fault(0, "kill-random", 1, rank=0, variant="training", amount=draw.random() / 2),
    ]
    between.faults = [
        Fault(0, "signal", 2, rank=1, variant="SIGTERM"),
        Fault(0, "kill-in-save", 1, site="state-torn", rank=1),
        Fault(0, "signal-twice", 4, rank=0, variant="SIGINT"),
        Fault(0, "rank-mismatch", rank=1, variant="seed"),
        Fault(0, "open-error", 1, rank=1, variant="idx ESTALE", amount=1),
        Fault(0, "link", variant="symbolic metrics.jsonl"),
        Fault(0, "malformed", variant="files-null"),
        Fault(0, "open-error-lasting", 1, rank=0, variant="manifest EIO"),
        Fault(0, "pipe", variant="state"),
        Fault(0, "hang-start", rank=1),
        Fault(0, "damage", variant="manifest-missing"),
        Fault(0, "stop-for-ever", 2, rank=1),
    ]
    goes_back = _series_homes(draw, 2, 1)[0]
    goes_back.faults = [
        Fault(0, "stop-between-bad", variant="SIGTERM", batch=SERIES[0][0]),
        Fault(0, "stop-between-bad", variant="SIGINT", batch=SERIES[0][1]),
    ]
    return _numbered([beside, between, goes_back])


def _kinds(count: int) -> list[str]:
    total = sum(SHARES.values())
    kinds = [kind for kind, share in SHARES.items() for _ in range(max(1, share * count // total))]
    common = ["kill-in-save", "damage", "kill-random"]
    kinds += [common[index % len(common)] for index in range(count - len(kinds))]
    return kinds[:count]


SORTS = {"rank-mismatch": tuple(MISMATCHES), "link": LINKS, "pipe": PIPES, "malformed": MALFORMED}


def _drawn(draw: random.Random, number: int, kind: str, turn: int) -> Fault:
    after, rank = draw.randint(1, 5), draw.randrange(4)
    if kind == "kill-one":
        return Fault(number, kind, after, rank=rank, amount=draw.choice([0.0, 0.05 * draw.random()]))
    if kind == "kill-all":
        return Fault(number, kind, after, rank=rank, all_ranks=True)
    if kind == "kill-random":
        when = draw.choice(["starting", "training", "training"])
        seconds = draw.random() * (2.0 if when == "starting" else 0.8)
        return Fault(
            number, kind, after, rank=rank, all_ranks=draw.random() < 0.5, variant=when, amount=seconds
        )
    if kind == "kill-in-save":
        site = SITES[turn % len(SITES)]
        if site in RANK_0_SITES:
            rank = 0
        delay = draw.choice([0.0, 0.1 * draw.random()])
        return Fault(number, kind, after, rank=rank, site=site, all_ranks=draw.random() < 0.5, amount=delay)
    if kind in ("signal", "signal-twice", "stop-between-bad"):
        return Fault(number, kind, after, rank=rank, variant=draw.choice(["SIGTERM", "SIGINT"]))
    if kind == "pause":
        return Fault(number, kind, after, rank=rank, amount=0.2 + draw.random())
    if kind == "damage":
        return Fault(number, kind, variant=DAMAGES[turn % len(DAMAGES)], rank=draw.randrange(100))
    if kind == "disk-full":
        return Fault(number, kind, after, rank=rank, variant=("before", "mid-write", "last-byte")[turn % 3])
    if kind.startswith("open-error"):
        what, lasting = OPENED[turn % len(OPENED)], kind == "open-error-lasting"
        nth = 1 if lasting else draw.randint(1, {"bin": 6, "idx": 2}.get(what, 1))
        error = ERRORS[turn % len(ERRORS)]
        return Fault(
            number,
            kind,
            nth,
            rank=rank,
            variant=f"{what} {error}",
            amount=0 if lasting else draw.randint(1, 2),
        )
    if kind in SORTS:
        return Fault(number, kind, variant=SORTS[kind][turn % len(SORTS[kind])], rank=1 + draw.randrange(3))
    if kind == "clock":
        return Fault(number, kind, after, rank=rank, amount=draw.choice([-1, 1]) * (1 + 20 * draw.random()))
    return Fault(number, kind, after, rank=rank, all_ranks=kind == "kill-in-load" and draw.random() < 0.5)


def _numbered(scenarios: list[Scenario]) -> list[Scenario]:
    number = 0
    for position, scenario in enumerate(scenarios, start=1):
        scenario.number = position
        moving = scenario.moving
        if moving:  # to layouts of one precision, so that the end can be compared
            scenario.layout = replace(scenario.layout, precision=MOVES[0].precision)
        for index, fault in enumerate(scenario.faults):
            number += 1
            of_rank = not moving and (fault.kind not in BETWEEN or fault.kind == "rank-mismatch")
            rank = fault.rank % scenario.layout.processes if of_rank else fault.rank
            if of_rank and fault.kind == "rank-mismatch":  # what differs is compared with rank 0
                rank = max(1, rank)
            scenario.faults[index] = replace(fault, number=number, rank=rank)
    return scenarios
