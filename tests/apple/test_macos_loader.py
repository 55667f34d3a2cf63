"""The macOS wheel's code is run: a loader (machorun/) maps its Mach-O extension in arm64 Linux, under qemu.

Needs ``qemu-aarch64-static`` and ``aarch64-linux-gnu-gcc`` (Debian: qemu-user-static, gcc-aarch64-linux-gnu,
libc6-dev-arm64-cross), zig as test_macos_wheel.py does, and for what needs Python a folder with an arm64 one, which
``machorun/sysroot.sh FOLDER`` fills and ANELLM_ARM64_ROOT names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from macho import MachO
from machorun.mutants import MUTANTS
from zig_tools import NO_ZIG, ROOT, STUBS, ZIG_CC, has_zig

HERE = Path(__file__).resolve().parent
MACHORUN = HERE / "machorun"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64") or ""
GCC = "aarch64-linux-gnu-gcc"
ARM64 = os.environ.get("ANELLM_ARM64_ROOT", "")
CC = os.environ.get("CC", "cc").split()

Shared = Callable[[str, Callable[[Path], object]], Path]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason=f"no C source in {ROOT}"),
    pytest.mark.skipif(not QEMU, reason="no qemu-aarch64-static on PATH (Debian: qemu-user-static)"),
    pytest.mark.skipif(
        shutil.which(GCC) is None, reason=f"no {GCC} on PATH (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross)"
    ),
    pytest.mark.skipif(not has_zig(), reason=NO_ZIG),
    pytest.mark.slow,
]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("ANELLM_")} | environment
    words = [str(word) for word in command]
    return subprocess.run(words, env=own, capture_output=True, text=True, timeout=300, check=False)


def succeed(*command: object, **environment: str) -> str:
    done = run(*command, **environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def compile_for_macos(source: Path, out: Path) -> Path:
    flags = ["-O2", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-Wno-builtin-requires-header"]
    succeed(*ZIG_CC, *flags, f"-L{STUBS / 'lib'}", "-lobjc", "-shared", source, "-o", out)
    return out


@pytest.fixture(scope="module")
def loader(shared: Shared) -> Path:
    """Return the folder of libmachorun.so and machorun."""
    return shared("machorun", lambda folder: succeed("bash", MACHORUN / "build.sh", folder, CC=GCC))


@pytest.fixture(scope="module")
def probe(shared: Shared) -> Path:
    """Return a macOS library that calls what the loader's adapters stand for, and checks what comes back."""

    def fill(folder: Path) -> None:
        compile_for_macos(MACHORUN / "probe.c", folder / "probe.dylib")

    return shared("probe", fill) / "probe.dylib"


# ---- what an import becomes ------------------------------------------------------------------------------------------


def test_the_bindings_are_the_reviewed_imports(loader: Path, probe: Path) -> None:
    rows = [line.rsplit(" ", 1) for line in succeed(QEMU, loader / "machorun").splitlines()]
    lines = (HERE / "imports.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(name for name, _ in rows) == [line for line in lines if line and not line.startswith("#")]
    # what differs between the systems is what the probe looks at; Python's two are called by every test further below
    adapted = {name.split()[1] for name, kind in rows if kind == "adapted" and name.startswith("libSystem")}
    assert len(adapted) > 40
    assert adapted <= set(MachO(probe.read_bytes()).imports)


def test_the_adapters_do_what_macos_documents(loader: Path, probe: Path, tmp_path: Path) -> None:
    """On failure the number is the line of probe.c that does not hold."""
    done = run(QEMU, loader / "machorun", probe, "probe", PROBE_FOLDER=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("sysconf", "sysconf(29) is not known"),
        ("sysctlbyname", 'sysctlbyname("hw.memsize") is not known'),
        ("clock_gettime", "clock_gettime: clock 12"),
        ("open", "open: flags 0x200000 are not known"),
        ("mmap", "mmap: flags 0x800 are not known"),
        ("mprotect", "mprotect: protection 0x10 is not known"),
        ("flock", "flock: operation 0x10 is not known"),
        ("format", 'format "%Lf": %L differs on macOS'),
        ("__snprintf_chk", "__snprintf_chk: 64 bytes into 63"),
        ("pthread_mutex_lock", "pthread_mutex_lock: signature 0, expected 0x32aaaba7"),
        ("pthread_cond_signal", "pthread_cond_signal: signature 0, expected 0x3cb0b1bb"),
        ("pthread_once", "pthread_once: signature 0, expected 0x30b1bcba"),
        ("dlsym", 'dlsym(0xfffffffffffffffe, "malloc")'),
        ("objc_msgSend", "call of objc_msgSend: not here"),
    ],
)
def test_what_has_no_counterpart_ends_the_process(loader: Path, probe: Path, function: str, message: str) -> None:
    done = run(QEMU, loader / "machorun", probe, f"dies_of_{function}")
    assert done.stderr.splitlines()[0] == f"machorun: {message}"
    assert done.stdout == ""
    assert done.returncode != 0


def writes_to_code(program: Path, probe: Path) -> bool:
    return run(QEMU, program, probe, "writes_to_code").returncode != -signal.SIGSEGV


def test_code_cannot_be_written_to(loader: Path, probe: Path) -> None:
    assert not writes_to_code(loader / "machorun", probe)


def test_an_import_without_a_binding_is_named(loader: Path, probe: Path, tmp_path: Path, wheel: Path) -> None:
    source = tmp_path / "new.c"
    source.write_text("int getppid(void);\nint new(void);\nint new(void) { return getppid(); }\n", encoding="utf-8")
    library = compile_for_macos(source, tmp_path / "new.dylib")
    done = run(QEMU, loader / "machorun", library, "new")
    assert (done.returncode, done.stderr) == (2, "import _getppid of libSystem.B.dylib: no binding\n")
    done = run(QEMU, loader / "machorun", probe, "new")
    assert (done.returncode, done.stderr) == (2, "the image does not export new\n")
    # in a process without Python, its functions are missing as well
    done = run(QEMU, loader / "machorun", unpack(wheel, tmp_path) / "anellm" / "_anellm.abi3.so", "PyInit__anellm")
    assert done.returncode == 2
    assert re.fullmatch(r"import __?Py\w+ of process: no binding\n", done.stderr)


def test_the_tests_notice_mistakes(loader: Path, probe: Path, tmp_path: Path) -> None:
    """A fixup that is skipped, or an adapter that passes Linux's values on, fails the probe."""

    def survives(name: str) -> bool:
        file, old, new = MUTANTS[name]
        text = (MACHORUN / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name}: {old!r} stands {text.count(old)} times in {file}"
        folder = tmp_path / re.sub(r"\W", "_", name)
        shutil.copytree(loader, folder)
        (folder / "source").mkdir()
        (folder / "source" / file).write_text(text.replace(old, new), encoding="utf-8")
        succeed("bash", MACHORUN / "build.sh", folder, folder / "source", CC=f"{GCC} -w")
        done = run("timeout", "20", QEMU, folder / "machorun", probe, "probe", PROBE_FOLDER=str(folder / "source"))
        return (done.returncode, done.stdout) == (0, "0\n") and not writes_to_code(folder / "machorun", probe)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert [name for name, alive in zip(MUTANTS, pool.map(survives, MUTANTS), strict=True) if alive] == []


# ---- files that are no such libraries --------------------------------------------------------------------------------

UUID, SEGMENT, DYSYMTAB, BUILD_VERSION, DYLD_INFO = 0x1B, 0x19, 0xB, 0x32, 0x80000022


def command(data: bytes, kind: int, nth: int = 0) -> int:
    """Return where the load command is."""
    (n,) = struct.unpack_from("<I", data, 16)
    at, found = 32, []
    for _ in range(n):
        this, size = struct.unpack_from("<2I", data, at)
        found += [at] * (this == kind)
        at += size
    return found[nth]


def put(form: str, place: int | Callable[[bytes], int], value: int) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        changed = bytearray(data)
        struct.pack_into(form, changed, place if isinstance(place, int) else place(data), value)
        return bytes(changed)

    return edit


def fixups(data: bytes, part: int, byte: int = 0) -> int:
    """Return where a byte of the rebases (0), binds (1) or lazy binds (3) is."""
    return struct.unpack_from("<I", data, command(data, DYLD_INFO) + 8 + 8 * part)[0] + byte


def rebase_text(data: bytes) -> bytes:
    """Rebase the first pointer of segment 0, which is not written to: type, segment, offset 0, one pointer."""
    at = fixups(data, 0)
    return data[:at] + bytes([0x11, 0x20, 0x00, 0x51]) + data[at + 4 :]


BAD = {
    "nothing": (lambda data: b"", "0 bytes are no Mach-O file"),
    "a header without commands": (lambda data: data[:40], "the load commands end after the file's 40 bytes"),
    "cut off": (lambda data: data[:-1], "segment __LINKEDIT ends after the file's"),
    "a fat file": (put(">I", 0, 0xCAFEBABE), "magic 0xbebafeca: expected a thin 64-bit Mach-O, 0xfeedfacf"),
    "an ELF file": (put("<I", 0, 0x464C457F), "magic 0x464c457f"),
    "for x86-64": (put("<I", 4, 0x01000007), "CPU type 0x1000007: expected arm64, 0x100000c"),
    "a program": (put("<I", 12, 2), "file type 2: expected a library (6) or bundle (8)"),
    "a command without size": (put("<I", 36, 0), " has 0 of "),
    "a command too long": (put("<I", 36, 0x10000), " has 65536 of "),
    "an unknown command": (put("<I", lambda data: command(data, UUID), 0x99), "load command 0x99 is not known"),
    "chained fixups": (
        put("<I", lambda data: command(data, UUID), 0x80000034),
        "LC_DYLD_CHAINED_FIXUPS: fixups of a format that is not known",
    ),
    "for iOS": (put("<I", lambda data: command(data, BUILD_VERSION) + 8, 2), "LC_BUILD_VERSION: not for macOS"),
    "old relocations": (put("<I", lambda data: command(data, DYSYMTAB) + 76, 1), "LC_DYSYMTAB: relocations"),
    "a segment not in the file": (
        put("<Q", lambda data: command(data, SEGMENT, 2) + 40, 1 << 40),
        "segment __DATA ends after the file's",
    ),
    "a segment too large": (put("<Q", lambda data: command(data, SEGMENT, 2) + 32, 1 << 60), "segment __DATA: 1152921"),
    "segments in one place": (put("<Q", lambda data: command(data, SEGMENT, 2) + 24, 0), "segment __DATA overlaps"),
    "thread-local variables": (
        put("<I", lambda data: command(data, SEGMENT, 2) + 72 + 64, 0x11),
        "section __la_symbol_ptr: type 0x11 is not known",
    ),
    "Objective-C classes": (
        lambda data: data.replace(b"__la_symbol_ptr\0", b"__objc_classlist", 1),
        "section __objc_classlist: the image defines Objective-C classes",
    ),
    "weak definitions": (put("<I", lambda data: command(data, DYLD_INFO) + 28, 8), "weak definitions are not known"),
    "fixups not in the file": (put("<I", lambda data: command(data, DYLD_INFO) + 12, 1 << 30), "the fixups end after"),
    "an unknown rebase": (put("B", lambda data: fixups(data, 0), 0xF0), "rebase opcode 0xf0 is not known"),
    "a rebase of half a pointer": (put("B", lambda data: fixups(data, 0), 0x12), "a rebase of type 2, not a pointer"),
    "a rebase of code": (rebase_text, "a rebase at 0:0"),
    "an unknown bind": (put("B", lambda data: fixups(data, 1), 0xD0), "bind opcode 0xd0 is not known"),
    "a bind to no library": (put("B", lambda data: fixups(data, 1), 0x19), "a bind to library 9 of 2"),
    "a bind to this very image": (put("B", lambda data: fixups(data, 1), 0x30), "a bind to special library 0"),
    "a bind of nothing": (put("B", lambda data: fixups(data, 1), 0x90), "a bind of nothing"),
    "a bind without an end": (put("B", lambda data: fixups(data, 1), 0x20), "bind"),
}


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return image.c as a program of this machine, with sanitizers."""
    if shutil.which(CC[0]) is None:
        pytest.skip(f"no C compiler {CC[0]}")
    out = tmp_path_factory.mktemp("check") / "check"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wconversion", "-Werror"]
    sources = [MACHORUN / "image.c", MACHORUN / "check.c"]
    succeed(*CC, "-std=gnu11", "-D_GNU_SOURCE", *sanitizers, *warnings, *sources, "-o", out)
    return out


def test_bad_files_are_refused_with_a_reason(check: Path, probe: Path, tmp_path: Path) -> None:
    files = []
    for i, (edit, _) in enumerate(BAD.values()):
        files.append(tmp_path / str(i))
        files[-1].write_bytes(edit(probe.read_bytes()))
    first, *lines = succeed(check, probe, *files).splitlines()
    assert re.fullmatch(r"ok \d+ \d+", first)
    found = {name: line for name, line in zip(BAD, lines, strict=True) if BAD[name][1] not in line}
    assert found == {}


def test_no_damage_does_harm(check: Path, probe: Path) -> None:
    """Every cut is refused; damage is refused or does not matter; the sanitizers find nothing in either case."""
    cut, cuts, damaged, damages = map(int, re.findall(r"\d+", succeed(check, "--sweep", probe)))
    assert cut == cuts > 1000
    assert damages > 10000
    assert damaged > damages / 10


# ---- the wheel in Python ---------------------------------------------------------------------------------------------


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def arm64_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the arm64 Python, which must not find the Python files of this one."""
    if not ARM64:
        pytest.skip("ANELLM_ARM64_ROOT is not set: bash tests/apple/machorun/sysroot.sh FOLDER prepares one")
    (python,) = (path for path in Path(ARM64, "root", "usr", "bin").glob("python3.*") if path.name[8:].isdigit())
    path = f"{ARM64}/site:{MACHORUN}"
    return run(QEMU, "-L", f"{ARM64}/root", python, "-B", "-P", *arguments, PYTHONPATH=path)


@pytest.fixture(scope="module")
def mac(loader: Path, wheel: Path, shared: Shared) -> dict[str, object]:
    """Return what steps.py prints over the wheel."""

    def fill(folder: Path) -> None:
        library = loader / "libmachorun.so"
        done = arm64_python(MACHORUN / "steps.py", "neon,vdsp,portable", library, unpack(wheel, folder))
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        (folder / "steps.json").write_text(done.stdout, encoding="utf-8")

    return json.loads((shared("mac", fill) / "steps.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def here() -> dict[str, object]:
    """Return what steps.py prints over this machine's anellm."""
    keep = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    return json.loads(succeed(sys.executable, MACHORUN / "steps.py", "portable", **keep))


def test_the_module_of_the_wheel_is_imported(mac: dict[str, object], here: dict[str, object], wheel: Path) -> None:
    assert mac["machine"] == "aarch64"
    image = Path(str(mac["origin"]))
    assert image.read_bytes() == zipfile.ZipFile(wheel).read("anellm/_anellm.abi3.so")
    assert image.read_bytes()[:4] == bytes.fromhex("cffaedfe")
    assert mac["tiers"] == ["vdsp", "neon", "portable"]
    # the whole interface: functions, constants with their values, types with their sizes
    assert len(mac["interface"]) > 150
    assert mac["interface"] == here["interface"]
    assert mac["version"] == here["version"]


@pytest.mark.parametrize("tier", ["neon", "vdsp", "portable"])
def test_training_steps_agree_with_this_machine(mac: dict[str, object], here: dict[str, object], tier: str) -> None:
    """The same arithmetic in another order, with another libm: fp32 sums of up to 96 terms differ by some 1e-7 of
    their size, and 1e-8 of it was seen in the loss and in the first gradient's norm. Eight steps of AdamW carry on with
    such differences, and made 2e-7 of them in the loss, which itself moved by 15 %.
    """
    (one, two), (reference, _) = mac[tier], here["portable"]
    assert one == two, "the weights depend on the number of threads"
    assert one["losses"][0] == pytest.approx(reference["losses"][0], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-6)
    assert one["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert one["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert reference["losses"][-1] < 0.9 * reference["losses"][0], "nothing was learned"


def test_the_tiers_are_different_code(mac: dict[str, object]) -> None:
    assert len({mac[tier][0]["sha256"] for tier in ("neon", "vdsp", "portable")}) == 3


def test_steps_on_the_simulator_agree(mac: dict[str, object], here: dict[str, object]) -> None:
    """fp16 between the programs: a difference of 1e-8 before a rounding can become one of 2^-11 after it, in a few of
    some thousand values; 1e-6 was seen in the loss.
    """
    assert mac["ane-sim"]["losses"] == pytest.approx(here["ane-sim"]["losses"], rel=2e-5)
    assert mac["ane-sim"]["grad_norm"] == pytest.approx(here["ane-sim"]["grad_norm"], rel=2e-4)


def test_the_neural_engine_is_refused(mac: dict[str, object]) -> None:
    """device_ane.m runs as far as to look at the system and to open the framework."""
    expected = "the Apple Neural Engine: machorun opens no libraries, on macOS 15.0, Apple, by machorun"
    assert mac["ane"] == expected


def test_python_gets_an_import_error(loader: Path, wheel: Path, tmp_path: Path) -> None:
    image = tmp_path / "short.so"
    image.write_bytes(zipfile.ZipFile(wheel).read("anellm/_anellm.abi3.so")[:-1000])
    code = f"import loader; from pathlib import Path; loader.load(Path({str(loader / 'libmachorun.so')!r}), "
    done = arm64_python("-c", f"{code}Path({str(image)!r}), 'PyInit__anellm')")
    assert done.returncode == 1
    assert re.search(
        r"^ImportError: .*/short\.so: segment __LINKEDIT ends after the file's \d+ bytes$", done.stderr, re.MULTILINE
    )
