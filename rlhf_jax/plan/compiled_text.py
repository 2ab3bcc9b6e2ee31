"""Counts what one chip does in one call of a compiled program, from the program's text.

The text is `jax.stages.Compiled.as_text()`, optimised HLO: named computations, of which one is the
entry, and in each an instruction a line, `%name = type opcode(operands), attributes`. A loop's body
is written once and counted as often as it runs. An asynchronous collective is written two or three
times and counted once. Cycles are in it on TPUs only, and not for Pallas kernels, sorts and
collectives.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_GRID = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# What a TPU's compiler writes as calls, although nothing runs.
_NO_KERNELS = (
    *("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"),
    *("AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"),
)
_NO_ESTIMATE = 2**62  # the TPU 7x compiler writes 2^63 - 1 where it has none


@dataclass(frozen=True)
class Collective:
    """A kind of message that the chips exchange.

    Attributes:
      kind: one of `KINDS`.
      shape: of a chip's result, such as "bf16[8,2048]"; several arrays with a space between.
      size: bytes of that result.
      chips: how many exchange it with each other.
      in_loop: whether a loop repeats it.
      overlapped: whether it is begun and ended by two instructions, so that others run meanwhile.
      span: one more than the numbers of two chips that exchange it are apart at most.
    """

    kind: str
    shape: str
    size: int
    chips: int
    in_loop: bool
    overlapped: bool
    span: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each chip sends at least, as a ring of them does."""
        others = self.chips - 1
        if self.kind == "all-reduce":
            return 2 * self.size * others / self.chips
        if self.kind == "reduce-scatter":
            return self.size * others
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.size
        return self.size * others / self.chips


@dataclass(frozen=True)
class Counted:
    """Counts of one chip and one call.

    Attributes:
      calls: how often each collective happens.
      kernels: how often each custom call happens, by its target's name: "tpu_custom_call" is a
        Pallas kernel, names with "cudnn" and "cublas" are of those libraries.
      cycles: the compiler's estimate, 0 where it has none (GPU, CPU).
      flops: of the `dot` instructions and of cuBLAS's products, two a multiplication and addition;
        a TPU's compiler makes convolutions of them, which are not counted: there the cycles say it.
    """

    calls: Mapping[Collective, int]
    kernels: Mapping[str, int]
    cycles: int
    flops: int

    @property
    def collectives(self) -> dict[str, tuple[int, float]]:
        """kind → (how many, bytes of their results on a chip), of the kinds there are."""
        return {
            kind: (
                sum(n for each, n in self.calls.items() if each.kind == kind),
                float(sum(n * each.size for each, n in self.calls.items() if each.kind == kind)),
            )
            for kind in KINDS
            if any(each.kind == kind for each in self.calls)
        }

    @property
    def collective_bytes(self) -> float:
        """Bytes of the results of all collectives on a chip."""
        return sum(size for _, size in self.collectives.values())

    def sent_bytes(self, *, overlapped: bool, beyond: int = 0) -> float:
        """Bytes that a chip sends at least, by collectives that are overlapped or by the others.

        Only those whose chips are further apart than `beyond` count.
        """
        found = (
            n * each.sent
            for each, n in self.calls.items()
            if each.overlapped == overlapped and each.span > beyond
        )
        return float(sum(found))

    def shapes(self, *, in_loop: bool) -> dict[str, int]:
        """ "kind shape" → how often, of the collectives inside or outside of loops."""
        found: Counter[str] = Counter()
        for each, n in self.calls.items():
            if each.in_loop == in_loop:
                found[f"{each.kind} {each.shape}"] += n
        return dict(found)


def count(text: str, chips: int, passes: int = 1) -> Counted:
    """Counts one chip's part of one call of a program.

    Of a conditional the costliest branch is counted.

    Args:
      text: optimised HLO, from `compiled.as_text()`.
      chips: that run the program together; the size of a collective's group that names none.
      passes: of a loop whose count the text does not say.
    """
    program = _Program(text, chips, passes)
    total = program.visit(program.entry, in_loop=False)
    return Counted(dict(total.calls), dict(total.kernels), total.cycles, total.flops)


def bytes_of(text: str) -> int:
    """Bytes of the arrays in an HLO type, such as "(bf16[8,128]{1,0}, s32[])"; padding is none."""
    arrays = _ARRAY.findall(text)
    return sum(-(-math.prod(_sizes(f"x[{dims}]")) * _bits(dtype) // 8) for dtype, dims in arrays)


def _sizes(array: str) -> list[int]:
    """The dimensions of one array's type, such as "bf16[8,2048]{1,0}"."""
    return [int(size) for size in array.partition("[")[2].partition("]")[0].split(",") if size]


def _bits(dtype: str) -> int:
    width = re.match(r"[a-z]+(\d+)", dtype)  # f32, s4, bf16, f8e4m3fn
    if width is None:
        return 8 if dtype == "pred" else 0  # others hold nothing: token, opaque
    return int(width[1])


@dataclass(frozen=True)
class _Instruction:
    """`%name = type opcode(rest`: the rest holds operands and attributes."""

    name: str
    type: str
    opcode: str
    rest: str

    def named(self, attributes: str) -> str:
        """The computation that the first of these attributes, "a|b", names."""
        found = re.search(rf"\b(?:{attributes})=\{{?%?([\w.\-]+)", self.rest)
        if found is None:
            raise ValueError(f"the instruction %{self.name} names no computation as {attributes}")
        return found[1]

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if listed:
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return [self.named("true_computation"), self.named("false_computation")]

    @property
    def target(self) -> str:
        """The function that a custom call calls, "" for another instruction."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def operand(self) -> str:
        """The name of the first operand."""
        found = re.search(r"%([\w.\-]+)", self.rest)
        return found[1] if found else ""

    @cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate of it, with what it calls."""
        found = re.search(r'estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found and int(found[1]) < _NO_ESTIMATE else None


@dataclass
class _Total:
    """What has been counted so far."""

    calls: Counter[Collective] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    flops: int = 0

    def add(self, other: _Total, times: int = 1) -> None:
        """Adds another total so many times."""
        for collective, n in other.calls.items():
            self.calls[collective] += times * n
        for kernel, n in other.kernels.items():
            self.kernels[kernel] += times * n
        self.cycles += times * other.cycles
        self.flops += times * other.flops

    @property
    def cost(self) -> tuple[int, int, int]:
        """Orders the branches of a conditional."""
        return self.cycles, self.flops, sum(n * each.size for each, n in self.calls.items())


class _Program:
    """The computations of a text by name, and the walk through them."""

    def __init__(self, text: str, chips: int, passes: int):
        self.chips, self.passes = chips, passes
        self.parts: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        self._visited: dict[tuple[str, bool], _Total] = {}
        part: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                part = self.parts[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                part[match[1]] = _Instruction(*match.groups())

    def visit(self, name: str, *, in_loop: bool) -> _Total:
        """The total of one pass through a computation."""
        if (name, in_loop) not in self._visited:
            total = self._visited[name, in_loop] = _Total()
            for each in self.parts[name].values():
                self._count(each, name, in_loop, total)
        return self._visited[name, in_loop]

    def _count(self, each: _Instruction, part: str, in_loop: bool, total: _Total) -> None:
        """Adds one instruction of a computation, with what it calls, to its total."""
        total.cycles += each.cycles or 0
        if each.opcode == "while":
            for name in ("condition", "body"):
                total.add(self.visit(each.named(name), in_loop=True), self._trips(each))
        elif each.opcode == "conditional":
            found = [self.visit(name, in_loop=in_loop) for name in each.branches]
            total.add(max(found, key=lambda branch: branch.cost))
        elif each.opcode in ("fusion", "call", "async-start"):
            called = self.visit(each.named("calls|to_apply"), in_loop=in_loop)
            total.add(called if each.cycles is None else replace(called, cycles=0))
        elif each.opcode == "custom-call-start" and "called_computations" in each.rest:
            # A TPU 7x has its sparse cores exchange messages while the others compute.
            called = self.visit(each.named("called_computations"), in_loop=in_loop)
            for collective, n in called.calls.items():
                total.calls[replace(collective, overlapped=True)] += n
        elif each.opcode == "custom-call":
            target = each.target
            if target not in _NO_KERNELS:
                total.kernels[target] += 1
            if "cublas" in target and "_contracting_" in each.rest:
                total.flops += self._flops(each, part)
        elif each.opcode == "dot":
            total.flops += self._flops(each, part)
        elif each.opcode.removesuffix("-done") in KINDS and not self._continues(part):
            collective = self._collective(each, part, in_loop)
            if collective.chips > 1:  # along an axis of size 1 nothing is exchanged
                total.calls[collective] += 1

    def _trips(self, loop: _Instruction) -> int:
        """How often a loop runs: stated on GPUs and CPUs, on TPUs a constant of its condition."""
        known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
        if known:
            return int(known[1])
        constants = [
            int(each.rest.partition(")")[0])
            for each in self.parts[loop.named("condition")].values()
            if each.opcode == "constant" and re.match(r"[su]32\[\]", each.type)
        ]
        if max(constants, default=0) < 2:  # no bound of a counter: once round is no loop
            return self.passes
        return max(constants)

    def _continues(self, part: str) -> bool:
        """Whether a TPU's computation goes on with, or ends, a collective begun by another one."""
        targets = self._targets(part)
        within = part.startswith("async_collective_fusion") or "AsyncCollectiveDone" in targets
        return within and "AsyncCollectiveStart" not in targets

    def _targets(self, part: str) -> set[str]:
        """The targets of a computation's custom calls."""
        return {each.target for each in self.parts[part].values()}

    def _collective(self, each: _Instruction, part: str, in_loop: bool) -> Collective:
        kind, result, begun = each.opcode, each.type, each
        overlapped = "AsyncCollectiveStart" in self._targets(part)
        if kind.endswith("-done"):  # its result is the collective's, its operand is the start
            kind, overlapped = kind.removesuffix("-done"), True
            begun = self.parts[part].get(each.operand, each)
        if kind == "all-reduce" and "all-reduce-scatter" in part:
            # A TPU's reduce-scatter: each chip keeps a slice of the sum.
            kind, result = "reduce-scatter", [*self.parts[part].values()][-1].type
        arrays = _ARRAY.findall(result)
        shape = " ".join(f"{dtype}[{sizes}]" for dtype, sizes in arrays)
        size, group = bytes_of(result), self._group(begun)
        span = max(group) - min(group) + 1
        if pairs := re.search(r"source_target_pairs=\{(\{[^=]*\})\}", begun.rest):
            ends = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
            span = 1 + max(abs(int(a) - int(b)) for a, b in ends)
        return Collective(kind, shape, size, len(group), in_loop, overlapped, span)

    def _group(self, each: _Instruction) -> list[int]:
        """The chips of a group that a collective is among, the first one."""
        if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", each.rest):
            sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes[1])}
            over, apart, group = re.findall(r"'([^']*)'", axes[2]), math.prod(sizes.values()), [0]
            for name, size in sizes.items():
                apart //= size
                if name in over:
                    group = [chip + apart * i for chip in group for i in range(size)]
            return group
        if grid := _GRID.search(each.rest):
            sides = [int(size) for size in grid[2].split(",")]
            chips = np.arange(math.prod(sides)).reshape(sides)
            if grid[3]:
                chips = chips.transpose([int(axis) for axis in grid[3].split(",")])
            return chips.ravel()[: int(grid[1])].tolist()
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", each.rest):
            return [*map(int, listed[1].split(","))]
        return [*range(self.chips)]

    def _flops(self, dot: _Instruction, part: str) -> int:
        """2 · elements of the result · elements that each is a sum of."""
        left = self.parts[part][dot.operand].type
        contracted = re.search(r"lhs_contracting_dim(?:s=|ensions\":)[\[{]([^\]}]*)", dot.rest)
        axes = [int(i) for i in re.findall(r"\d+", contracted[1])] if contracted else []
        # cuBLAS's result has scratch memory beside it.
        return 2 * math.prod(_sizes(dot.type)) * math.prod(_sizes(left)[i] for i in axes)
