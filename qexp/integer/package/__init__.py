"""The export package: packed weights, the program, golden vectors, and C99 code that reproduces them.

    program.json, constants.safetensors   the integer program (`qexp.integer.files`)
    weights.bin                           weights of all convolutions and linear layers at their own bits (layout in `package.json`)
    golden.safetensors                    codes of a few images and of their scores
    c/                                    the network as C99 with its executor and a test: cc -std=c99 -O2 c/*.c -o golden && ./golden
                                          ends.h: network_encode (pixels to codes), network_decode (codes to scores), network_argmax
    package.json                          version, layout of weights.bin, what goes in and comes out (preprocessing, scales, zero
                                          points), and the SHA-256 of every file

Element i of a layer's weights is bits `[i * bits, (i + 1) * bits)` of its bytes in `weights.bin`, lowest bit first, two's complement where
`signed`; elements in C order, a layer begins at a whole byte. A layer with `levels: [rows, count]` has first that table (int32, little
endian, a row for all weights or one for each output); its elements are then places in their row of it. So binary weights take 1 bit,
and weights with 16 levels take 4, for any levels.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import tempfile
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qexp.errors import QexpError
from qexp.integer import files
from qexp.integer.ends import described
from qexp.integer.package.c_ends import ends
from qexp.integer.package.c_source import MAIN, golden, network
from qexp.integer.package.packing import coded, weights
from qexp.integer.program import Conv, IntegerProgram, Linear
from qexp.integer.reference import Reference
from qexp.integer.schema import Either, Exactly, Mapped, Whole, read_json
from qexp.integer.schema import check as checked
from qexp.numerics.packing import pack, unpack

FORMAT, VERSION = "qexp package", 3
MANIFEST, WEIGHTS, GOLDEN = "package.json", "weights.bin", "golden.safetensors"
LIBRARY = ("qexp_int.h", "qexp_int.c", "qexp_ops.c")
C_FILES = (*LIBRARY, "network.h", "network.c", "golden.h", "main.c")
REQUIRED = {files.PROGRAM, files.CONSTANTS, WEIGHTS, GOLDEN, *(f"c/{name}" for name in C_FILES)}
_LAYER = {
    **{
        "op": Whole(),
        "layer": str,
        "offset": Whole(0, 2**40),
        "bytes": Whole(0, 2**40),
        "bits": Whole(1, 63),
        "signed": bool,
    },
    **{"levels": Either((None, Exactly(2, Whole(1)))), "shape": [Whole(1)]},
}
SCHEMA = {
    **{"about": {}, "weights": [_LAYER], "weight_bytes": Whole(0, 2**40), "golden_images": Whole(1)},
    **{"files": Mapped(str)},
}
Ints = NDArray[np.int64]


def write(program: IntegerProgram, folder: Path, images: NDArray[np.float32]) -> dict[str, Any]:
    """Writes a package and returns its manifest.

    Args:
        program: The program to package.
        folder: Made, or emptied of an earlier package.
        images: A few real images `[N, C, H, W]` for the golden vectors.

    Raises:
        QexpError: A layer has no C form.
    """
    head, body = network(program)  # raises before anything is written
    shutil.rmtree(folder, ignore_errors=True)
    files.save(program, folder)
    blocks, layout = [], []
    for i, op in enumerate(program.ops):
        if isinstance(op, Conv | Linear):
            form = coded(op.weight)
            block = form.table + pack(form.codes, form.bits)
            place = {"op": i, "layer": op.layer, "offset": sum(map(len, blocks)), "bytes": len(block)}
            levels = None if form.levels is None else list(form.levels.shape)
            kind = {"bits": form.bits, "signed": form.signed, "levels": levels}
            layout.append({**place, **kind, "shape": list(op.weight.shape)})
            blocks.append(block)
    (folder / WEIGHTS).write_bytes(b"".join(blocks))
    codes = program.encode(images)
    scores = Reference(program).run(codes)
    # safetensors writes memory as it lies: codes of transposed results would stand in another order.
    golden_codes = {"input": np.ascontiguousarray(codes, np.int32), "output": np.ascontiguousarray(scores)}
    save_file(golden_codes, folder / GOLDEN)
    c = folder / "c"
    c.mkdir()
    for name in LIBRARY:
        (c / name).write_text((resources("qexp.integer.package") / name).read_text())
    for name, text in (
        ("ends.h", ends(program)),
        ("network.h", head),
        ("network.c", body),
        ("golden.h", golden(codes, scores)),
        ("main.c", MAIN),
    ):
        (c / name).write_text(text)
    (folder / "README.txt").write_text(__doc__.strip() + "\n")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "about": program.about,
        "weights": layout,
        "weight_bytes": sum(map(len, blocks)),
        "golden_images": len(images),
        **described(program),
        "files": {p.relative_to(folder).as_posix(): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def read(folder: Path) -> tuple[IntegerProgram, dict[str, Any], Ints, Ints]:
    """Returns a package's program, manifest, and golden codes of images and scores, after checking every file.

    Raises:
        QexpError: A file is missing, cut short or edited, or the package has another version. The message names file and difference.
    """
    manifest = _manifest(folder)
    for name, said in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise QexpError(f"{folder}: {name} is missing; export the run again")
        if _sha256(path) != said:
            raise QexpError(
                f"{folder}: {name} was edited or cut short since it was written (SHA-256 differs); export the run again"
            )
    program = files.load(folder)
    packed = (folder / WEIGHTS).read_bytes()
    if len(packed) != manifest["weight_bytes"]:
        raise QexpError(f"{folder}: {WEIGHTS} has {len(packed):,} bytes; {MANIFEST} has {manifest['weight_bytes']:,}")
    weighted = [i for i, op in enumerate(program.ops) if isinstance(op, Conv | Linear)]
    if sorted(entry["op"] for entry in manifest["weights"]) != weighted:
        raise QexpError(
            f"{folder}: {MANIFEST} does not name each of the program's {len(weighted)} layers with weights once"
        )
    for entry in manifest["weights"]:
        op = program.ops[entry["op"]]
        block = packed[entry["offset"] : entry["offset"] + entry["bytes"]]
        if entry["shape"] != list(op.weight.shape) or not np.array_equal(_weights(block, entry, folder), op.weight):
            raise QexpError(f"{folder}: {WEIGHTS} and the program disagree on the weights of {entry['layer']}")
    return program, manifest, *_golden(folder, program, manifest["golden_images"])


def _manifest(folder: Path) -> dict[str, Any]:
    """Returns `package.json` after checking its content and that it lists every file that is read or compiled."""
    try:
        manifest = read_json(folder / MANIFEST)
    except QexpError as error:
        raise QexpError(f"{folder}: not a package, {MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        said = manifest if isinstance(manifest, dict) else {}
        raise QexpError(
            f"{folder}: {said.get('format')!r:.40} of version {said.get('version')!r:.40}; this qexp reads {FORMAT!r} of version "
            f"{VERSION}: export the run again"
        )
    checked(manifest, SCHEMA, f"{folder}: {MANIFEST}")
    listed = set(manifest["files"])
    beyond = [name for name in listed if Path(name).is_absolute() or ".." in Path(name).parts]
    sources = {p.relative_to(folder).as_posix() for p in (folder / "c").glob("*.[ch]")}
    unlisted = sorted((REQUIRED | sources) - listed)
    if beyond or unlisted:
        what = f"lists {beyond[0]!r}, which lies outside" if beyond else f"does not list {unlisted[0]}"
        raise QexpError(f"{folder}: {MANIFEST} {what}; it lists every file of the package: export the run again")
    return manifest


def _golden(folder: Path, program: IntegerProgram, count: int) -> tuple[Ints, Ints]:
    """Returns the golden codes of images and scores."""
    try:
        vectors = load_file(folder / GOLDEN)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise QexpError(f"{folder}: {GOLDEN} is damaged ({error})") from None
    for name, tensor in (("input", program.input), ("output", program.output)):
        shape = (count, *program.tensors[tensor].shape)
        got = vectors.get(name)
        if got is None or got.shape != shape or got.dtype.kind not in "iu":
            raise QexpError(f"{folder}: {GOLDEN} holds no codes {list(shape)} called {name!r}")
    return vectors["input"].astype(np.int64), vectors["output"].astype(np.int64)


def _weights(block: bytes, entry: dict[str, Any], folder: Path) -> Ints:
    """Returns a layer's integer weights from its bytes; the number of bytes must match the layout."""
    shape, table = tuple(entry["shape"]), entry["levels"] or [0, 0]
    size, count = 4 * math.prod(table), math.prod(shape)
    if len(block) != size + -(-count * entry["bits"] // 8) or (size and table[0] not in (1, shape[0])):
        raise QexpError(
            f"{folder}: {MANIFEST} lists {entry['layer']} with {count} weights of {entry['bits']} bits in {len(block)} bytes of "
            f"{WEIGHTS}, which is inconsistent; export the run again"
        )
    levels = None
    if entry["levels"]:
        levels, block = np.frombuffer(block[:size], "<i4").astype(np.int64).reshape(entry["levels"]), block[size:]
    codes = unpack(block, count, entry["bits"], entry["signed"]).reshape(shape)
    return weights(codes, levels)


def check(folder: Path) -> dict[str, Any]:
    """Checks a package with its own files; returns the number of scores that `differ` and the output of the compiled C.

    `c` is None if there is no C compiler.
    """
    program, manifest, codes, scores = read(folder)
    try:
        computed = Reference(program).run(codes)
    except Exception as error:  # the operations come from a file: NumPy may raise anything for a wrong window or axis
        raise QexpError(
            f"{folder}: its program cannot be computed ({type(error).__name__}: {error}); export the run again"
        ) from error
    found = {
        "differ": int((computed != scores).sum()),
        "c": None,
        "weight_bytes": manifest["weight_bytes"],
    }
    compiler = shutil.which("cc")
    if compiler:
        found["c"] = compile_and_run(folder, compiler)
    return found


def compile_and_run(folder: Path, compiler: str = "cc") -> str:
    """Returns the output of the package's C test.

    Raises:
        QexpError: It does not compile, or a score differs.
    """
    sources = sorted(str(p) for p in (folder / "c").glob("*.c"))
    with tempfile.TemporaryDirectory() as scratch:
        binary = Path(scratch) / "golden"
        flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-pedantic"]
        built = subprocess.run([compiler, *flags, *sources, "-o", str(binary)], capture_output=True, text=True)
        if built.returncode:
            raise QexpError(f"{folder}/c does not compile with {compiler}:\n{built.stderr[:1000]}")
        ran = subprocess.run([str(binary)], capture_output=True, text=True)
    if ran.returncode:
        raise QexpError(f"{folder}/c: {ran.stdout.strip()}; the C code does not reproduce the program")
    return ran.stdout.strip()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
