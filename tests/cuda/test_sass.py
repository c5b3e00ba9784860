"""The machine code of the CUDA kernels: the matrix instructions meant, few others around them, and no spills.

Reads the objects of the last build with cuobjdump, from the CUDA toolkit or from the triton package. The counts are of
a whole function: its unrolled loop over 512 columns (tile_sm90) or 128 (tile_sm80), and what stands around it.

Hopper's kernels are fast only while a warpgroup makes fragments under its multiplications. The assembler gives that up
where it cannot keep their registers apart, for the whole function and for reasons that a small change brings about. It
then says so in a message that no build stops at.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sass

ROOT = Path(__file__).resolve().parents[2]
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))

NAMES = r"tile_sm\d\d|adjoint|pack|reduce|sparse_(?:stages|gather|reduce|adjoint)"


@dataclass(frozen=True)
class Kernel:
    architecture: str  # "sm_80"
    name: str
    parameters: tuple[int, ...]  # of the template
    operations: Counter[str]
    code: list[sass.Instruction] = field(repr=False)  # nothing but for tile_sm90 and sparse_stages


def find_tool(name: str, *folders: Path) -> str | None:
    on_path = shutil.which(name)
    return on_path or next((str(tool) for folder in folders if (tool := folder / name).is_file()), None)


def dump(path: Path) -> str:
    """The listing of an object or a cubin."""
    triton = importlib.util.find_spec("triton")
    folders = [CUDA_HOME / "bin"]
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    tool = find_tool("cuobjdump", *folders)
    if tool is None:
        pytest.skip("needs cuobjdump: install the CUDA toolkit's, or triton")
    return subprocess.run([tool, "--dump-sass", str(path)], capture_output=True, text=True, check=True).stdout


def compile_for_hopper(source: Path, cubin: Path) -> str:
    """Compiles a CUDA source as the build does; returns what the compiler says."""
    nvcc = os.environ.get("CUDACXX") or find_tool("nvcc", CUDA_HOME / "bin")
    if nvcc is None:
        pytest.skip("needs nvcc, of the CUDA toolkit")
    command = [nvcc, "-std=c++20", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc/cuda'}"]
    command += ['-DTRAK_FAST_CUDA_ARCHITECTURES="90a"', "-cubin", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@functools.cache
def kernels() -> list[Kernel]:
    objects = [path for path in ROOT.glob("build/*/CMakeFiles/*/csrc/cuda/*.cu.o") if "emulated" not in path.parts[-6]]
    if not objects:
        pytest.skip("needs a build with CUDA in this folder")
    found = []
    for path in objects:
        for architecture, mangled, listing in sass.functions(dump(path)):
            if match := re.match(rf"\S*?\d({NAMES})(\S*)", mangled):
                parameters = tuple(int(n) for n in re.findall(r"E?L(?:NS_\d[A-Z][a-z]+E|[bi])(\d+)", match[2]))
                lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z]+)?)", listing)
                operations = Counter(line.split(".")[0] for line in lines) + Counter(x for x in lines if "." in x)
                code = sass.instructions(listing) if match[1] in ("tile_sm90", "sparse_stages") else []
                found.append(Kernel(architecture, match[1], parameters, operations, code))
    return found


def of_name(name: str) -> list[Kernel]:
    chosen = [kernel for kernel in kernels() if kernel.name == name]
    assert chosen, f"no {name} in the build"
    return chosen


def test_every_kernel_is_there_for_every_architecture() -> None:
    built = {kernel.architecture for kernel in kernels() if kernel.name == "tile_sm80"}
    for architecture in built:
        names = Counter(kernel.name for kernel in kernels() if kernel.architecture == architecture)
        assert names["tile_sm80"] == 2 * 5 + 2 * 4, names  # types and widths of both kinds
        assert names["tile_sm90"] == (2 * 2 * 6 if architecture == "sm_90a" else 0), names
        assert names["reduce"] == 1
        assert names["pack"] == 4 + 3  # sources; of floats, too
        assert names["sparse_stages"] == 5 + 2 * 6  # widths and sizes of float32, and of two 16-bit types
        assert names["sparse_adjoint"] == 5
        assert names["sparse_gather"] == names["sparse_reduce"] == 1
        assert names["adjoint"] > 0


def test_no_spills() -> None:
    for kernel in kernels():
        assert kernel.operations["LDL"] + kernel.operations["STL"] == 0, kernel


def test_no_atomics() -> None:
    for kernel in kernels():
        assert not {"ATOM", "ATOMG", "ATOMS", "RED"} & set(kernel.operations), kernel


def test_sparse_stages() -> None:
    """A thread adds eight rows of all samples, or all that it has, in a loop of few instructions besides the sums."""
    for kernel in of_name("sparse_stages"):
        dtype, samples, _ = kernel.parameters
        copies = {instruction.operation for instruction in kernel.code if instruction.operation.startswith("LDGSTS")}
        widest = "128" if dtype == 0 else "64"
        assert any(widest in copy.split(".") for copy in copies), (kernel, copies)
        sums = [loop for loop in sass.loops(kernel.code) if sum(i.operation == "FADD" for i in loop) == 64]
        assert sums, kernel
        loop = min(sums, key=len)
        words = 32 if dtype > 0 and samples > 1 else 64
        assert sum(i.operation.startswith("LDS") for i in loop) == words + 1, kernel  # and a progression
        # A word of two samples takes two more operations. A row's address takes three, shared by all samples.
        assert len(loop) <= 64 + words + (64 if words == 32 else 0) + 3 * 64 // samples + 40, (kernel, len(loop))


def test_hopper_tiles() -> None:
    for kernel in of_name("tile_sm90"):
        kind = kernel.parameters[0]
        operations = kernel.operations
        fragments, left = divmod(operations["HGMMA"], 32)
        assert fragments in (1, 2), kernel
        assert left == 0, kernel
        assert operations["HMMA"] == 0, kernel
        # Those of the unit, and the one whose fragments are made before the loop. Two registers a thread's row, one
        # operation a register, and Philox; normal: the table.
        steps = 33 * fragments
        assert operations["LOP3"] <= (8 if kind == 0 else 37.5) * steps, kernel
        assert operations["LDS"] <= (0 if kind == 0 else 8) * steps, kernel
        # Descriptors stay in uniform registers: moved there in every step, they cost a quarter more instructions.
        assert operations["R2UR"] <= 16, kernel
        assert operations["UTMALDG"] > 0, kernel


def multiplies_in_the_background(code: list[sass.Instruction]) -> bool:
    """Returns True if multiplications are under way while the warpgroup does something else.

    The kernels wait for all of them where a segment ends and nowhere else. A compiler that serialises them waits for
    each (or, in a loop of a single step, moves that one wait there: then no second group is ever in flight).
    """
    return Counter(sass.waits(code))[0] == 1 and sass.scan(code).most_groups > 1


def test_hopper_tiles_multiply_in_the_background() -> None:
    for kernel in of_name("tile_sm90"):
        assert multiplies_in_the_background(kernel.code), (kernel, sass.waits(kernel.code))


def test_hopper_tiles_leave_registers_in_flight_alone() -> None:
    for kernel in of_name("tile_sm90"):
        hazards = sass.scan(kernel.code).hazards
        assert not hazards, (kernel, hazards)


@pytest.mark.compiles
def test_the_compiler_does_not_complain_of_hopper_tiles(tmp_path: Path) -> None:
    said = compile_for_hopper(ROOT / "csrc/cuda/tile_sm90.cu", tmp_path / "tile_sm90.cubin")
    # C7508, C7509, C7510, C7513: wgmmas serialised for one reason or another, or setmaxnreg ignored.
    assert "C75" not in said, said


def test_portable_tiles() -> None:
    for kernel in of_name("tile_sm80"):
        kind, _, width = kernel.parameters
        multiplications = width * (2 if width <= 64 else 1)  # 8 steps, width / 8 groups, one or two fragments
        assert kernel.operations["HMMA"] > 0, kernel
        assert kernel.operations["HMMA"] % multiplications == 0, kernel
        unrolled = kernel.operations["HMMA"] // multiplications
        assert kernel.operations["LOP3"] <= unrolled * (300 if kind == 0 else 750), kernel
        assert kernel.operations["LDGSTS"] > 0, kernel


def test_adjoint_multiplies_by_tensor_cores() -> None:
    for kernel in of_name("adjoint"):
        assert kernel.operations["HMMA"] > 0, kernel
        assert kernel.operations["MOVM"] > 0, kernel


# Whether these tests would notice ------------------------------------------------------------------------------------

# A multiplication like tile_sm90's, with stages of 4 steps and a loop of BODY steps. With 32 the assembler keeps the
# fragments apart. With as few as 8, or a single one, it reports C7513 and serialises all wgmmas.
LOOP = """
#include "ptx.cuh"

using namespace trak_fast;

template <int body>
__device__ void multiply(float* out, int units) {
  auto* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  const uint64_t operand = ptx::swizzled_descriptor(ptx::dynamic_shared());
  float sums[4] = {};
  uint32_t fragments[2][4];
  for (int unit = 0; unit < units; ++unit) {
#pragma unroll body
    for (int s = 0; s < 32; ++s) {
      uint32_t(&a)[4] = fragments[s % 2];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = (32 * unit + s) * (i + threadIdx.x);
      ptx::wgmma_operand(a);
      ptx::wgmma_fence();
      ptx::wgmma_m64k16<8, true>(sums, a, operand, 1);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (s % 4 == 0 && (unit > 0 || s > 0) && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
    }
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_operand(sums);
  for (int i = 0; i < 4; ++i) out[128 * i + threadIdx.x] = sums[i];
}

__global__ void steps(float* out, int units) { multiply<BODY>(out, units); }
"""


@pytest.mark.parametrize(("body", "serialised"), [(32, False), (8, True), (1, True)])
def test_a_serialised_loop_is_noticed(body: int, serialised: bool, tmp_path: Path) -> None:
    source, cubin = tmp_path / "loop.cu", tmp_path / "loop.cubin"
    source.write_text(LOOP.replace("BODY", str(body)))
    assert ("C75" in compile_for_hopper(source, cubin)) == serialised
    ((_, _, listing),) = sass.functions(dump(cubin))
    code = sass.instructions(listing)
    assert multiplies_in_the_background(code) != serialised, sass.waits(code)
    assert not sass.scan(code).hazards


def code_of(*lines: str) -> list[sass.Instruction]:
    return sass.instructions("".join(f"  /*{16 * i:04x}*/  {line} ;  /* 0x0 */\n" for i, line in enumerate(lines)))


# R24 .. R27 += R40 .. R43 times a matrix in shared memory; the second one: of R44 .. R47.
FIRST = "HGMMA.64x8x16.F32.BF16 R24, R40, gdesc[UR8], R24, gsb0"
SECOND = "HGMMA.64x8x16.F32.BF16 R24, R44, gdesc[UR8], R24, gsb0"
NONE_LEFT, ONE_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@pytest.mark.parametrize(
    ("instruction", "hazard"),
    [
        ("IMAD.MOV.U32 R44, RZ, RZ, R1", None),
        ("IMAD.MOV.U32 R41, RZ, RZ, R1", "writes the fragment R41"),
        ("@!P0 LOP3.LUT R43, R1, R2, RZ, 0x3c, !PT", "writes the fragment R43"),
        ("IMAD.MOV.U32 R1, RZ, RZ, R41", None),
        ("LDS.U16 R1, [R40+UR7+0x20000]", None),
        ("IMAD.MOV.U32 R24, RZ, RZ, RZ", "writes the sums R24"),
        ("FADD R1, R2, R27.reuse", "reads the sums R27"),
        ("LDS.U16 R1, [R25+0x20000]", "reads the sums R25"),
        # Values of two registers and of four, whose first one is not in flight.
        ("IMAD.WIDE.U32 R38, R1, R2, RZ", None),
        ("IMAD.WIDE.U32 R39, R1, R2, RZ", "writes the fragment R40"),
        ("IMAD.WIDE.U32 R2, R23, R23, R4", None),
        ("IMAD.WIDE.U32 R2, P0, R4, R4, R23", "reads the sums R24"),
        ("IMAD.SHL.U32 R39, R1, 0x2, RZ", None),
        ("CS2R R38, SRZ", None),
        ("@P1 CS2R R39, SRZ", "writes the fragment R40"),
        ("CS2R.32 R39, SR_CLOCKLO", None),
        ("LDS.64 R43, [R1]", "writes the fragment R43"),
        ("LDS.128 R36, [R1]", None),
        ("LDS.128 R37, [R1]", "writes the fragment R40"),
        ("LDG.E.128 R21, desc[UR42][R2.64]", "writes the sums R24"),
        ("LDC.64 R22, c[0x0][0x238]", None),
        ("LDC.64 R23, c[0x0][0x238]", "writes the sums R24"),
        ("STG.E.64 desc[UR42][R2.64], R22", None),
        ("STG.E desc[UR42][R2.64], R23", None),
        ("STG.E.64 desc[UR42][R2.64], R23", "reads the sums R24"),
        ("STG.E desc[UR42][R23.64], R2", "reads the sums R24"),
        ("STS.128 [R1], R21", "reads the sums R24"),
        # These write predicates or uniform registers.
        ("ISETP.NE.AND P0, PT, R40, RZ, PT", None),
        ("LOP3.LUT P0, RZ, R40, 0x1f, RZ, 0xc0, !PT", None),
        ("LOP3.LUT P0, R40, R1, 0x1f, RZ, 0xc0, !PT", "writes the fragment R40"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7+0x30000], R40", None),
        ("R2UR UR40, R40", None),
        ("UIMAD.WIDE.U32 UR24, UR40, UR41, URZ", None),
        ("UMOV UR40, 0x1", None),
        # Multiplications among themselves.
        ("HGMMA.64x8x16.F32.BF16 R24, R44, gdesc[UR8], R24, gsb0", None),
        ("HGMMA.64x8x16.F32.BF16 R28, R40, gdesc[UR8], R28, gsb0", None),
        ("HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", None),
        ("HGMMA.64x8x16.F32.BF16 R26, R44, gdesc[UR8], R26, gsb0", "writes the sums R26 R27"),
        ("HGMMA.64x16x16.F32.BF16 R36, R44, gdesc[UR8], R36, gsb0", "writes the fragment R40 R41 R42 R43"),
        ("HGMMA.64x8x16.F32.BF16 R28, R24, gdesc[UR8], R28, gsb0", "reads the sums R24 R25 R26 R27"),
    ],
)
def test_what_touches_a_multiplication_in_flight(instruction: str, hazard: str | None) -> None:
    hazards = sass.scan(code_of(FIRST, instruction, NONE_LEFT, "EXIT")).hazards
    assert any(f" {hazard} of HGMMA" in found for found in hazards) if hazard else not hazards, hazards
    assert not sass.scan(code_of(instruction, NONE_LEFT, FIRST, NONE_LEFT, instruction, NONE_LEFT, "EXIT")).hazards


def test_a_wait_ends_the_oldest_groups() -> None:
    first, second = "IMAD.MOV.U32 R40, RZ, RZ, R1", "IMAD.MOV.U32 R44, RZ, RZ, R1"
    assert sass.scan(code_of(FIRST, SECOND, ONE_LEFT, first, NONE_LEFT, second, "EXIT")) == sass.Scan(2, [])
    assert sass.scan(code_of(FIRST, SECOND, first, ONE_LEFT, NONE_LEFT, second, "EXIT")).hazards
    assert sass.scan(code_of(FIRST, SECOND, ONE_LEFT, first, second, NONE_LEFT, "EXIT")).hazards
    # A group of two: nothing waits for the one whose end has not been issued.
    group = (FIRST.removesuffix(", gsb0"), SECOND)
    assert sass.scan(code_of(*group, NONE_LEFT, first, second, "EXIT")) == sass.Scan(1, [])
    assert sass.scan(code_of(*group, ONE_LEFT, first, NONE_LEFT, "EXIT")).hazards
    assert sass.scan(code_of(group[0], NONE_LEFT, first, SECOND, NONE_LEFT, "EXIT")).hazards


def test_every_way_through_the_code_is_followed() -> None:
    rewrite, again, leave = "IMAD.MOV.U32 R40, RZ, RZ, R1", "@P0 BRA 0x0", "BRA 0x60"
    # Around a loop, where the last step's multiplication is in flight when the first step begins.
    assert not sass.scan(code_of(rewrite, FIRST, NONE_LEFT, again, "EXIT")).hazards
    assert sass.scan(code_of(rewrite, FIRST, ONE_LEFT, again, NONE_LEFT, "EXIT")).hazards
    # Where a branch leads, beyond the end of the ordinary code.
    assert not sass.scan(code_of(FIRST, NONE_LEFT, leave, "NOP", "NOP", "EXIT", rewrite, "EXIT")).hazards
    assert sass.scan(code_of(FIRST, leave, "NOP", "NOP", "NOP", "EXIT", rewrite, "EXIT")).hazards
    # But not behind one that is always taken.
    assert not sass.scan(code_of(FIRST, leave, rewrite, "EXIT", "NOP", "NOP", NONE_LEFT, "EXIT")).hazards
    assert sass.scan(code_of(FIRST, "@P0 " + leave, rewrite, "EXIT", "NOP", "NOP", NONE_LEFT, "EXIT")).hazards


@pytest.mark.parametrize(
    "instruction", ["CALL.REL.NOINC 0x0", "QGMMA.64x8x32.F32.E4M3.E4M3 R24, R40, gdesc[UR8], R24", "BSYNC B0"]
)
def test_the_scan_refuses_what_it_does_not_know(instruction: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(instruction)):
        sass.scan(code_of(FIRST, instruction, NONE_LEFT, "EXIT"))


def test_a_planted_hazard_is_noticed() -> None:
    for kernel in of_name("tile_sm90"):
        if kernel.parameters[2] == 256:
            code = kernel.code
            at = [i for i, instruction in enumerate(code) if instruction.operation.startswith("HGMMA")][16]
            for register, touched in ((code[at].operands[0], "sums"), (code[at].operands[1], "fragment")):
                planted = sass.Instruction(code[at].address + 8, "", "IMAD.MOV.U32", (register, "RZ", "RZ", "RZ"))
                hazards = sass.scan([*code[: at + 1], planted, *code[at + 1 :]]).hazards
                assert any(f"writes the {touched} {register} of {code[at]}" in hazard for hazard in hazards), kernel
