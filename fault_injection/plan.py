"""Which faults strike which runs: all of it follows from a seed and a number of faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

INTERVAL = 3
"""Steps between checkpoints of every run."""

BATCH = 8
"""Global batch size of every run."""

KEPT = 3
"""Newest checkpoints that stay."""

SHARES = {
    "kill-one": 22, "kill-all": 14, "kill-random": 24, "kill-in-save": 36, "kill-in-load": 6, "signal": 16,
    "signal-twice": 8, "pause": 12, "stop-for-ever": 6, "damage": 30, "all-damaged": 3, "disk-full": 10,
    "read-error": 6, "read-error-lasting": 4, "nan": 8, "clock": 10, "layout": 8,
}  # fmt: skip
"""Kinds of faults, and how often each comes for 223 of them."""

ENDING = {
    "kill-one", "kill-all", "kill-random", "kill-in-save", "kill-in-load", "signal", "signal-twice",
    "stop-for-ever", "read-error", "read-error-lasting",
}  # fmt: skip
"""End the run, so that it is started again."""

BETWEEN = {"damage", "all-damaged", "layout"}
"""Happen between two starts."""

RANK_0_SITES = ("weights-torn", "manifest", "manifest-torn", "before-rename", "after-rename", "removing")
SITES = ("before-state", "state-torn", *RANK_0_SITES)
"""Places inside a save, in their order."""

DAMAGES = (
    "truncated", "bit-flipped", "missing", "empty", "manifest-flipped", "manifest-empty", "manifest-missing",
    "half-copied", "deleted",
)  # fmt: skip


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

    def arguments(self) -> list[str]:
        """Options of a run."""
        return [
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
        after: steps of training after the start at which it strikes.
        site: inside a save, or "".
        rank: that it strikes, modulo the number of processes.
        all_ranks: strike all of them.
        variant: what else tells it apart: a signal, a sort of damage.
        amount: seconds (``pause``, delays of ``kill-*``), hours (``clock``), free bytes (``disk-full``).
    """

    number: int
    kind: str
    after: int = 1
    site: str = ""
    rank: int = 0
    all_ranks: bool = False
    variant: str = ""
    amount: float = 0.0

    def __str__(self) -> str:
        words = [self.kind, self.variant, self.site and f"at {self.site}"]
        if self.kind not in BETWEEN and self.kind not in ("kill-all", "disk-full"):
            words.append("all ranks" if self.all_ranks else f"rank {self.rank}")
        return " ".join(word for word in words if word)


@dataclass
class Scenario:
    """A run and the faults that it goes through. A run that is complete with faults left is followed by another.

    Args:
        number: counts from 1.
        layout: of every start, unless faults of the kind ``layout`` change it.
        overlap: as ``train.checkpoint_overlap``.
        on_failure: as ``train.on_checkpoint_failure``.
        steps: of a whole run.
        faults: in their order.
        nan_batches: global batches in which a rank's gradient is not a number, and that rank.
    """

    number: int
    layout: Layout
    overlap: bool
    on_failure: str
    steps: int = 30
    faults: list[Fault] = field(default_factory=list)
    nan_batches: dict[int, int] = field(default_factory=dict)

    @property
    def moving(self) -> bool:
        """Whether the layout changes, so that equality is to rounding."""
        return any(fault.kind == "layout" for fault in self.faults)

    @property
    def step_timeout_s(self) -> float:
        """As ``train.step_timeout_s``; short only where a hang is going to come."""
        return 6.0 if any(fault.kind == "stop-for-ever" for fault in self.faults) else 90.0

    def __str__(self) -> str:
        layout = "changing layouts" if self.moving else str(self.layout)
        return f"{layout}, checkpoints {'beside' if self.overlap else 'between'} steps"


def make_plan(seed: int, count: int) -> list[Scenario]:
    """Runs and ``count`` faults, drawn from ``seed``."""
    draw = random.Random(seed)
    kinds = _kinds(count)
    draw.shuffle(kinds)
    number = max(4, round(count / 14))
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
    # Some kinds need runs of their own sort: a small disk, a short time-out, changing layouts.
    homes = {
        "layout": scenarios[-1:] if number < 10 else scenarios[-2:],
        "stop-for-ever": scenarios[1:3],
        "disk-full": scenarios[0:3:2] + scenarios[1:2] + scenarios[5:7],
        "nan": [s for s in scenarios[:-2] if s.layout.processes < 4],
    }
    dealt = 0
    for index, kind in enumerate(kinds):
        if kind in homes:
            home = homes[kind][index % len(homes[kind])]
        else:
            home, dealt = scenarios[dealt % number], dealt + 1
        # Sites and sorts of damage come in turn, so that none is left out.
        fault = _drawn(draw, index + 1, kind, kinds[:index].count(kind))
        if kind == "nan":
            batch = draw.choice([b for b in range(2, home.steps - 2) if b not in home.nan_batches])
            home.nan_batches[batch] = draw.randrange(home.layout.processes)
        home.faults.append(fault)
    return _numbered([scenario for scenario in scenarios if scenario.faults])


def short_plan(seed: int) -> list[Scenario]:
    """One fault of every important kind, in a minute."""
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
        Fault(0, "damage", variant="manifest-missing"),
        Fault(0, "stop-for-ever", 2, rank=1),
    ]
    return _numbered([beside, between])


def _kinds(count: int) -> list[str]:
    total = sum(SHARES.values())
    kinds = [kind for kind, share in SHARES.items() for _ in range(max(1, share * count // total))]
    common = ["kill-in-save", "damage", "kill-random"]
    kinds += [common[index % len(common)] for index in range(count - len(kinds))]
    return kinds[:count]


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
    if kind in ("signal", "signal-twice"):
        return Fault(number, kind, after, rank=rank, variant=draw.choice(["SIGTERM", "SIGINT"]))
    if kind == "pause":
        return Fault(number, kind, after, rank=rank, amount=0.2 + draw.random())
    if kind == "damage":
        return Fault(number, kind, variant=DAMAGES[turn % len(DAMAGES)], rank=draw.randrange(100))
    if kind == "disk-full":
        return Fault(number, kind, after, rank=rank, variant=("before", "mid-write", "last-byte")[turn % 3])
    if kind == "clock":
        return Fault(number, kind, after, rank=rank, amount=draw.choice([-1, 1]) * (1 + 20 * draw.random()))
    return Fault(number, kind, after, rank=rank, all_ranks=kind == "kill-in-load" and draw.random() < 0.5)


def _numbered(scenarios: list[Scenario]) -> list[Scenario]:
    number = 0
    for position, scenario in enumerate(scenarios, start=1):
        scenario.number = position
        moving = scenario.moving
        for index, fault in enumerate(scenario.faults):
            number += 1
            of_rank = not moving and fault.kind not in BETWEEN
            rank = fault.rank % scenario.layout.processes if of_rank else fault.rank
            scenario.faults[index] = replace(fault, number=number, rank=rank)
    return scenarios
