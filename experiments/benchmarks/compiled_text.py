"""Reads the texts that XLA's compilers write, and counts what a compiled program runs.

For a GPU that is the list of thunks: launches of kernels and copies, and the CUDA graphs and loops
that contain them. For a TPU it is the program itself (HLO) and the schedule of each operation.
Counts are by (place, kind) and contain every trip of a loop; a place is "forward", "backward"
(loops over time) or "outside".
"""

import itertools
import re
from collections import Counter
from typing import NamedTuple

PLACES = ("forward", "backward")
KINDS = {  # of launches, by kind and text of the thunk; a loop's counter is a kernel of one thread
    "product": r"kGemm|kCublas|k(Custom)?Kernel \S*(gemm|dot)",
    "loop counter": r"k(Custom)?Kernel .*grid: \[1, 1, 1\] threads: \[1, 1, 1\]",
    "elementwise": r"k(Custom)?Kernel ",
    "copy": r"k\w*(Copy|Mem)",
    "other": "",
}
FREE = r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|opt-barrier|.*-done"
SILENT = {"kAsyncDone", "kWaitForStreams"}  # the host waits, and the device runs nothing
THUNK = re.compile(r"(?P<indent> *)(?P<number>\d+): (?P<kind>k\w+)\s*(\[[^\]]*\])?(?P<text>.*)")
COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>\S+) \(.*\{$")
INSTRUCTION = re.compile(
    r"\s+(ROOT )?%?(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<operation>[\w-]+)\((?P<rest>.*)"
)
SCHEDULE = "-schedule-analysis_final_bundles.txt"  # ends the name of libtpu's file of an operation


class Thunk(NamedTuple):
    """An entry of the list of thunks; graphs, loops and slices contain others."""

    kind: str
    number: int
    text: str
    children: list["Thunk"]


Computations = dict[str, list[re.Match]]  # of INSTRUCTION, a match for each line


def read_thunks(text: str) -> list[Thunk]:
    """The tree of thunks, without the conditions of loops: XLA knows how often each runs."""
    top: list[Thunk] = []
    parents, in_condition = [(-1, top)], False
    for line in text.splitlines():
        if line.strip() in ("condition:", "body:"):
            in_condition = line.strip() == "condition:"
        elif not in_condition and (found := THUNK.match(line)) is not None:
            indent = len(found["indent"])
            while parents[-1][0] >= indent:
                parents.pop()
            thunk = Thunk(found["kind"], int(found["number"]), found["text"].strip(), [])
            parents[-1][1].append(thunk)
            parents.append((indent, thunk.children))
    return top


def read_thunk_names(metadata: str) -> dict[int, str]:
    """{number of a thunk: name of its instruction in HLO}; the number 0 is not written."""
    found = re.findall(r'profile_annotation: "([^"]*)"(?:\s+thunk_id: (\d+))?', metadata)
    return {int(number or 0): name for name, number in found}


def count_launches(thunks: str, metadata: str, hlo: str) -> tuple[Counter, int]:
    """(launches by place and kind, launches by the host, where a CUDA graph is one)."""
    names, loops = read_thunk_names(metadata), read_loops(read_computations(hlo)[0])
    total, by_host = Counter(), 0

    def walk(thunks, runs, place, in_graph):
        nonlocal by_host
        for thunk in thunks:
            if thunk.kind == "kWhile":
                trips, place_of_body = loops[names[thunk.number]]
                walk(thunk.children, runs * trips, place_of_body, in_graph)
            elif thunk.children:
                is_graph = thunk.kind == "kCommandBuffer"
                by_host += runs * (is_graph and not in_graph)
                walk(thunk.children, runs, place, in_graph or is_graph)
            elif thunk.kind not in SILENT:
                label = f"{thunk.kind} {thunk.text}"
                kind = next(kind for kind, pattern in KINDS.items() if re.match(pattern, label))
                total[place, kind] += runs
                by_host += runs * (not in_graph)

    walk(read_thunks(thunks), 1, "outside", False)
    return total, by_host


def read_computations(hlo: str) -> tuple[Computations, str]:
    """({name: instructions}, the name of the entry)."""
    computations: Computations = {}
    entry = name = ""
    for line in hlo.splitlines():
        if (head := COMPUTATION.match(line)) is not None:
            name = head["name"]
            computations[name], entry = [], name if head["entry"] else entry
        elif (found := INSTRUCTION.match(line)) is not None:
            computations[name].append(found)
    return computations, entry


def read_loops(computations: Computations) -> dict[str, tuple[int, str]]:
    """{name: (number of trips, place)} of every while loop; ValueError if the number is unknown."""
    return {
        it["name"]: (_trips(it, computations), PLACES["transpose(" in it["rest"]])
        for it in itertools.chain.from_iterable(computations.values())
        if it["operation"] == "while"
    }


def _trips(loop: re.Match, computations: Computations) -> int:
    """XLA's own count, or else the constant in the condition: a loop of `lax.scan` starts at 0."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop["rest"]):
        return int(known[1])
    names, bounds = [_called("condition", loop)], []
    for name in names:
        for it in computations[name]:
            if it["operation"] == "constant" and it["type"].startswith("s32[]"):
                bounds.append(int(it["rest"].partition(")")[0]))
            if "calls=" in it["rest"]:
                names.append(_called("calls", it))
    if len(bounds) != 1:
        raise ValueError(f"the condition of {loop['name']} must have one bound, got {bounds}.")
    return bounds[0]


def _called(how: str, instruction: re.Match) -> str:
    """The computation that an instruction names as its body, condition, calls or to_apply."""
    return re.findall(rf"\b{how}=%?([^\s,]+)", instruction["rest"])[0]


def read_bundles(schedules: dict[str, str]) -> dict[str, int]:
    """{instruction: its VLIW bundles}, from {file name: text} of libtpu's schedules."""
    names = {file: re.sub(r"^\d+-|-\d+$", "", file.removesuffix(SCHEDULE)) for file in schedules}
    pattern = re.compile(r"total scheduled bundles:\s*(\d+)")  # a custom call may have no schedule
    return {names[file]: sum(map(int, pattern.findall(text))) for file, text in schedules.items()}


def count_operations(hlo: str, bundles: dict[str, int]) -> Counter:
    """Operations, estimated cycles and bundles of a TPU program, by place.

    Operations on scalars (counters of loops, indices) and those that run nothing do not count.
    """
    computations, entry = read_computations(hlo)
    loops, total = read_loops(computations), Counter()

    def walk(name, runs, place):
        for it in computations[name]:
            if it["operation"] == "while":
                trips, place_of_body = loops[it["name"]]
                walk(_called("body", it), runs * trips, place_of_body)
            elif it["operation"] == "call":
                walk(_called("to_apply", it), runs, place)
            elif not re.fullmatch(FREE, it["operation"]):
                cycles = re.search(r'"estimated_cycles":"(\d+)"', it["rest"])
                total[place, "operations"] += runs * (not re.match(r"\w+\[\]", it["type"]))
                total[place, "cycles"] += runs * int(cycles[1] if cycles else 0)
                total[place, "bundles"] += runs * bundles.get(it["name"], 0)

    walk(entry, 1, "outside")
    return total
