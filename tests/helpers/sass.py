"""Reads the machine code of NVIDIA's GPUs (SASS, as cuobjdump lists it), and looks for registers touched under a wgmma.

A wgmma works on after it has been issued: until it is waited for, its operands in registers belong to it. In SASS it
is HGMMA; the last one of a group names the counter gsb0, and WARPGROUP.DEPBAR waits until at most so many groups are
left. The assembler should keep all other instructions away from those registers. Nothing says so where it does not, and
the sums may then be wrong only now and then: hence this scan.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@!P0", or nothing
    operation: str  # "IMAD.WIDE.U32"
    operands: tuple[str, ...]

    def __str__(self) -> str:
        words = f"{self.predicate} {self.operation} {', '.join(self.operands)}"
        return f"{words.strip()} (at {self.address:#x})"


class Multiplication(NamedTuple):
    """The registers of an HGMMA."""

    sums: frozenset[int]
    fragment: frozenset[int]  # of A; none where A is in shared memory


class Flight(NamedTuple):
    """The HGMMAs in flight when an instruction is reached, by their indexes in the code."""

    groups: tuple[tuple[int, ...], ...] = ()  # the oldest first
    begun: tuple[int, ...] = ()  # of the group whose last HGMMA is still to come


class Scan(NamedTuple):
    most_groups: int  # in flight at once
    hazards: list[str]


# Operations that write no register, though one may be their first operand. (That of a store is an address in brackets.)
_WRITE_NOTHING = {"BAR", "DSETP", "FCHK", "FSETP", "HSETP2", "ISETP", "NANOSLEEP", "R2P", "WARPSYNC"}
_OF_64_BITS = {"CS2R", "DADD", "DFMA", "DMUL", "LEPC"}
_CONVERSIONS = {"F2F", "F2I", "FRND", "I2F"}
_OF_MATRICES = {"HMMA", "IMMA", "LDSM"}
_UNKNOWN_JUMPS = {"BREAK", "BRX", "BRXU", "CALL", "JMP", "JMX", "JMXU", "RET"}
_PREDICATE = re.compile(r"!?U?P(\d|T|R)")
_MOST_IN_FLIGHT = 64  # HGMMAs: more than any kernel has, so that the scan of a loop without waits ends


def functions(listing: str) -> Iterator[tuple[str, str, str]]:
    """The architecture, the mangled name and the part of the listing of each function in cuobjdump's output."""
    architecture = ""
    for piece in re.split(r"(?=code for )|(?=Function : )", listing):
        if match := re.match(r"code for (\S+)", piece):
            architecture = match[1]
        elif match := re.match(r"Function : (\S+)", piece):
            yield architecture, match[1], piece


def instructions(listing: str) -> list[Instruction]:
    """The instructions of one function."""
    found = []
    for address, predicate, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([^;]+?)\s*;", listing):
        operation, _, operands = text.partition(" ")
        split = tuple(operand.strip() for operand in operands.split(",")) if operands else ()
        found.append(Instruction(int(address, 16), predicate, operation, split))
    return found


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The instructions of each loop: those from where a branch leads back to, to the branch."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    for i, instruction in enumerate(code):
        if instruction.operation == "BRA" and (first := index[int(instruction.operands[-1], 16)]) <= i:
            yield code[first : i + 1]


def waits(code: list[Instruction]) -> list[int]:
    """Counts the groups that each wait for HGMMAs leaves in flight, in the order of the code.

    What stands before the first HGMMA has nothing to wait for, and does not count.
    """
    first = next((i for i, instruction in enumerate(code) if "GMMA" in instruction.operation), len(code))
    return [left for instruction in code[first:] if (left := _groups_left(instruction)) is not None]


def scan(code: list[Instruction]) -> Scan:
    """Looks for instructions that touch registers of HGMMAs in flight, on every way through the code.

    None may write the fragment or the sums, or read the sums, even if its predicate says that it does nothing. Only
    another HGMMA may add to exactly the same sums, because the tensor cores work through them in order.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    following = [_following(code, i, index) for i in range(len(code))]
    reads, writes = [_reads(instruction) for instruction in code], [_writes(instruction) for instruction in code]
    multiplications = {i: own for i, instruction in enumerate(code) if (own := _multiplication(instruction))}
    hazards: dict[str, None] = {}  # a set that keeps their order
    most_groups = 0
    to_visit = [(0, Flight())]
    seen = set(to_visit)
    while to_visit:
        i, flight = to_visit.pop()
        in_flight = (*(j for group in flight.groups for j in group), *flight.begun)
        assert len(in_flight) <= _MOST_IN_FLIGHT, f"nothing waits for what is in flight at {code[i]}"
        for j in in_flight:
            other = multiplications[j]
            touched = {
                "writes the fragment": writes[i] & other.fragment,
                "writes the sums": writes[i] & other.sums,
                "reads the sums": reads[i] & other.sums,
            }
            if i in multiplications and multiplications[i].sums == other.sums:
                touched |= {"writes the sums": frozenset(), "reads the sums": multiplications[i].fragment & other.sums}
            for what, registers in touched.items():
                if registers:
                    names = " ".join(f"R{register}" for register in sorted(registers))
                    hazards[f"{code[i]} {what} {names} of {code[j]}"] = None
        after = _after(code, i, flight)
        most_groups = max(most_groups, len(after.groups))
        new = {(k, after) for k in following[i]} - seen
        seen |= new
        to_visit += new
    return Scan(most_groups, list(hazards))


def _after(code: list[Instruction], i: int, flight: Flight) -> Flight:
    """Returns what is in flight once instruction i has been issued."""
    if "GMMA" in code[i].operation:
        begun = (*flight.begun, i)
        return Flight((*flight.groups, begun)) if "gsb0" in code[i].operands else Flight(flight.groups, begun)
    left = _groups_left(code[i])
    if left is None:
        return flight
    return Flight(flight.groups[max(len(flight.groups) - left, 0) :], flight.begun)


def _following(code: list[Instruction], i: int, index: dict[int, int]) -> list[int]:
    """The instructions that may come after instruction i. `index` finds them by their addresses."""
    instruction = code[i]
    name = instruction.operation.split(".")[0]
    assert name not in _UNKNOWN_JUMPS, f"a jump that this scan does not know: {instruction}"
    next_one = [i + 1] if i + 1 < len(code) else []
    if name == "BRA":
        target = index[int(instruction.operands[-1], 16)]
        # All but the plainest form may go on instead: for the predicate before it, one among the operands, or a vote.
        always = instruction.operation == "BRA" and not instruction.predicate and len(instruction.operands) == 1
        return [target] if always else [target, *next_one]
    if name == "EXIT":
        return next_one if instruction.predicate else []
    if name == "BSYNC":  # goes on where its barrier's BSSY said: the assembler puts it just before that
        said = {int(x.operands[1], 16) for x in code if x.operation == "BSSY" and x.operands[0] in instruction.operands}
        assert code[i + 1].address in said, f"goes on elsewhere: {instruction}"
    return next_one


def _groups_left(instruction: Instruction) -> int | None:
    """Returns the number of groups that a wait for HGMMAs leaves in flight; None for other instructions."""
    return int(instruction.operands[1], 16) if instruction.operation == "WARPGROUP.DEPBAR.LE" else None


def _multiplication(instruction: Instruction) -> Multiplication | None:
    """The registers of an HGMMA; None for other instructions."""
    if "GMMA" not in instruction.operation:
        return None
    shape = re.match(r"HGMMA\.64x(\d+)x\d+\.F32\b", instruction.operation)
    assert shape, f"a wgmma that this scan does not know: {instruction}"
    sums, a, *others = instruction.operands
    added = {operand for operand in others if re.match(r"R(\d|Z)", operand)}
    assert added <= {sums, "RZ"}, f"adds to other registers than it writes: {instruction}"
    fragment = frozenset() if a.startswith("gdesc") else _registers(a, 4)
    return Multiplication(_registers(sums, int(shape[1]) // 2), fragment)


def _writes(instruction: Instruction) -> frozenset[int]:
    if own := _multiplication(instruction):
        return own.sums
    return _registers(_split(instruction)[0], _width(instruction))


def _reads(instruction: Instruction) -> frozenset[int]:
    if own := _multiplication(instruction):
        return own.sums | own.fragment
    sources = [source for source in _split(instruction)[1] if not _PREDICATE.fullmatch(source)]
    widths = [_width(instruction)] * len(sources)
    if re.match(r"IMAD\.(WIDE|HI)", instruction.operation):  # factors of 32 bits; what is added to them has 64
        widths = [1, 1, 2]
    return frozenset().union(*(_registers(source, width) for source, width in zip(sources, widths, strict=True)))


def _split(instruction: Instruction) -> tuple[str, list[str]]:
    """The register that the instruction writes (the first of them; nothing where it writes none), and other operands.

    Predicates that it writes come before; they are left out.
    """
    others = list(instruction.operands)
    if instruction.operation.split(".")[0] in _WRITE_NOTHING:
        return "", others
    while others and _PREDICATE.fullmatch(others[0]):
        others.pop(0)
    return (others[0], others[1:]) if others and re.fullmatch(r"R\d+", others[0]) else ("", others)


def _width(instruction: Instruction) -> int:
    """Counts the registers of a value that the instruction makes, loads or stores: rather too many than too few."""
    name, *modifiers = instruction.operation.split(".")
    if name in _OF_MATRICES or "128" in modifiers:
        return 4
    if name in _OF_64_BITS:
        return 1 if "32" in modifiers else 2
    if name in _CONVERSIONS:
        return 2 if "64" in instruction.operation else 1
    return 2 if {"64", "WIDE"} & set(modifiers) else 1


def _registers(operand: str, width: int) -> frozenset[int]:
    """The registers of an operand that has `width` of them, or of an address in brackets; uniform ones do not count."""
    found: set[int] = set()
    for first, modifiers in re.findall(r"\bR(\d+)((?:\.\w+)*)", operand):
        count = width if "[" not in operand else 2 if ".64" in modifiers else 1
        found.update(range(int(first), int(first) + count))
    return frozenset(found)
