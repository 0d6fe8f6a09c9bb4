"""Time and memory of `germane merge`, side by side with mergekit and with plain reading.

    python benchmarks/merge.py --mergekit PATH/TO/mergekit-yaml
    python benchmarks/merge.py --memory

The first form makes a pool of random checkpoints with the architecture of SmolLM2-135M, merges it
with both programs, each in a process of its own, and compares the weights that come out. Every
number can be held against a floor: a process that only reads all inputs and writes one output.
mergekit runs twice, computing in bfloat16 (what its examples set) and in float32; both write
bfloat16. Of several repeats the fastest is reported; the programs take turns, so that other work
on the machine meets all of them.

The second form asks whether the memory of germane grows with the pool: 4 checkpoints against 24
for every method that streams.

The tables go to standard output and, as JSON, to benchmarks/results. `pip install torch
safetensors` and germane itself are all this needs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PROGRAMS = ("floor", "germane", "mergekit bfloat16", "mergekit float32")
SMALL_POOL, LARGE_POOL = 4, 24
SAMPLE_SECONDS = 0.05
MEBIBYTE = 2**20

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}

FLOOR = """
import os, sys
block, (output, first, *others) = 2**23, sys.argv[1:]
target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for name in (first, *others):
    source, position = os.open(name, os.O_RDONLY), 0
    while data := os.pread(source, block, position):
        position += len(data)
        if name == first:
            os.write(target, data)
"""


@dataclass(frozen=True)
class Method:
    """One merge rule as both programs name it."""

    germane: tuple[str, ...]
    mergekit: str
    parameters: dict[str, float]
    needs_base: bool = True


METHODS = {
    "linear": Method(("--method", "average"), "linear", {"weight": 1.0}, needs_base=False),
    "task-arithmetic": Method(
        ("--method", "task-arithmetic", "--scale", "0.3"), "task_arithmetic", {"weight": 0.3}
    ),
    "ties": Method(
        ("--method", "ties", "--trim", "tensor", "--density", "0.2"),
        "ties",
        {"weight": 1.0, "density": 0.2},
    ),
}

STREAMING: dict[str, tuple[str, ...]] = {
    "average": ("--method", "average"),
    "task-arithmetic": ("--method", "task-arithmetic"),
    "ties": ("--method", "ties", "--trim", "tensor", "--density", "0.2"),
    "dare-linear": ("--method", "dare", "--form", "linear"),
    "dare-ties": ("--method", "dare", "--form", "ties"),
    "breadcrumbs": ("--method", "breadcrumbs"),
}


@dataclass(frozen=True)
class Usage:
    """What one process cost, and how busy the machine was when it started."""

    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_rss_mebibytes: float
    peak_anonymous_mebibytes: float
    load_before: float

    @property
    def cpu_seconds(self) -> float:
        """User and system time together."""
        return self.user_seconds + self.system_seconds


@dataclass(frozen=True)
class Difference:
    """How far two merged checkpoints lie apart."""

    largest: float
    share_equal: float
    share_different: float
    tensors_in_one_only: int


# --- the pool ---------------------------------------------------------------------------------


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of the architecture in `CONFIG`; the head is tied."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    keys = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def make_pool(folder: Path, size: int) -> None:
    """Write `folder`/base and `folder`/ft0, ft1, ...; what is already there stays."""
    import torch
    from safetensors.torch import load_file, save_file

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        checkpoint = folder / name
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text(json.dumps(CONFIG, indent=2))
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})

    def noise(seed: int, spread: float) -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for name, shape in tensor_shapes().items():
            yield name, spread * torch.randn(shape, generator=generator)

    if not (folder / "base").exists():
        write("base", {name: tensor.bfloat16() for name, tensor in noise(0, 0.02)})
    base = load_file(folder / "base" / "model.safetensors")
    for index in range(size):
        if not (folder / f"ft{index}").exists():
            moved = {name: base[name] + tensor for name, tensor in noise(index + 1, 0.002)}
            write(f"ft{index}", {name: tensor.bfloat16() for name, tensor in moved.items()})


def pool_members(folder: Path, size: int) -> list[Path]:
    """The first `size` fine-tuned checkpoints."""
    return [folder / f"ft{index}" for index in range(size)]


# --- measuring --------------------------------------------------------------------------------


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a fresh process, so that this one stays small.

    A child's peak memory as the kernel reports it begins with the size of the process that
    started it.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(function, *arguments).result()


def measure(label: str, command: Sequence[str]) -> Usage:
    """Run a command to its end; exits with its last words if it fails."""
    os.sync()
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        with peak_anonymous(process.pid) as peak:
            _, status, used = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            last_words = output.read()[-3000:].decode(errors="replace")
            raise SystemExit(f"exit status {process.returncode}: {' '.join(command)}\n{last_words}")
    print(f"{label}: {wall:.1f} s", file=sys.stderr, flush=True)
    return Usage(wall, used.ru_utime, used.ru_stime, used.ru_maxrss / 1024, max(peak) / MEBIBYTE, load)


@contextlib.contextmanager
def peak_anonymous(process: int) -> Iterator[list[int]]:
    """Sample the anonymous memory of a process and its children while the block runs."""
    samples, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            samples.append(anonymous_bytes(process))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def anonymous_bytes(process: int) -> int:
    """Memory not backed by a file: what the kernel cannot take back by dropping pages.

    `RssAnon` is a counter; the same figure from `smaps_rollup` walks every page that is mapped
    and slows the process it watches.
    """
    folder = Path("/proc") / str(process)
    try:
        lines = (folder / "status").read_text().splitlines()
        children = [name.read_text().split() for name in folder.glob("task/*/children")]
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
    return own + sum(anonymous_bytes(int(child)) for group in children for child in group)


# --- what is run ------------------------------------------------------------------------------


def germane_command(base: Path, pool: Sequence[Path], arguments: Sequence[str], out: Path) -> list[str]:
    """The command line of germane for one merge."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("germane", path=places)
    if program is None:
        raise SystemExit("no `germane` command beside this Python nor on PATH; install germane")
    return [program, "merge", str(base), *map(str, pool), *arguments, "--out", str(out)]


def mergekit_command(
    program: Path, base: Path, pool: Sequence[Path], method: Method, dtype: str, out: Path
) -> list[str]:
    """The command line of mergekit; its configuration is written beside `out`."""
    models = [{"model": str(model), "parameters": method.parameters} for model in pool]
    config: dict[str, Any] = {"merge_method": method.mergekit, "models": models}
    config |= {"base_model": str(base)} if method.needs_base else {}
    config |= {"dtype": dtype, "out_dtype": "bfloat16"}
    file = out.with_suffix(".json")
    file.write_text(json.dumps(config, indent=2))  # JSON is YAML
    return [str(program), str(file), str(out), "--quiet", "--no-copy-tokenizer"]


def floor_command(base: Path, pool: Sequence[Path], out: Path) -> list[str]:
    """The command line that reads every input and writes one output of the same size."""
    files = [str(model / "model.safetensors") for model in (base, *pool)]
    return [sys.executable, "-c", FLOOR, str(out), *files]


def tensors_of(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Tensor name -> opened safetensors file that holds it."""
    from safetensors import safe_open

    paths = sorted(folder.glob("*.safetensors"))
    files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
    return {name: file for file in files for name in sorted(file.keys())}


def compare_weights(first: Path, second: Path) -> Difference:
    """Entry by entry, over the tensors both checkpoints hold."""
    import torch

    largest, equal, total = 0.0, 0, 0
    with contextlib.ExitStack() as stack:
        left, right = tensors_of(first, stack), tensors_of(second, stack)
        for name in left.keys() & right.keys():
            one, other = (side[name].get_tensor(name).float() for side in (left, right))
            largest = max(largest, torch.nan_to_num((one - other).abs(), nan=math.inf).max().item())
            equal += int(torch.count_nonzero(one == other))
            total += one.numel()
    if not total:
        raise ValueError(f"{first} and {second} share no tensor")
    return Difference(largest, equal / total, 1 - equal / total, len(left.keys() ^ right.keys()))


# --- the two forms ----------------------------------------------------------------------------


def compare_programs(
    workdir: Path, mergekit: Path, size: int, names: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """One row for each method and program."""
    apart(make_pool, workdir, size)
    base, pool = workdir / "base", pool_members(workdir, size)
    measure("warm-up", floor_command(base, pool, workdir / "out-floor"))  # now the inputs are cached
    rows = []
    for name in names:
        method = METHODS[name]
        outs = {program: workdir / f"out-{program.replace(' ', '-')}" for program in PROGRAMS}
        commands = {
            "floor": floor_command(base, pool, outs["floor"]),
            "germane": germane_command(base, pool, method.germane, outs["germane"]),
        }
        for program in PROGRAMS[2:]:
            dtype, out = program.split()[1], outs[program]
            commands[program] = mergekit_command(mergekit, base, pool, method, dtype, out)
        usages = take_turns(name, commands, outs, repeats)
        for program in PROGRAMS:
            rows.append({"method": name, "program": program} | asdict(usages[program]))
            rows[-1] |= ratios(usages[program], usages["germane"])
            if program.startswith("mergekit"):
                rows[-1] |= asdict(apart(compare_weights, outs["germane"], outs[program]))
        for out in outs.values():
            remove(out)
    return rows


def take_turns(
    name: str, commands: Mapping[str, Sequence[str]], outs: Mapping[str, Path], repeats: int
) -> dict[str, Usage]:
    """Run all commands once, then all again; the fastest repeat of each."""
    usages: dict[str, list[Usage]] = {program: [] for program in commands}
    for _ in range(repeats):
        for program, command in commands.items():
            remove(outs[program])
            usages[program].append(measure(f"{name}, {program}", command))
    return {
        program: min(repeated, key=lambda usage: usage.wall_seconds) for program, repeated in usages.items()
    }


def ratios(usage: Usage, germane: Usage) -> dict[str, float]:
    """How many times germane's cost; above 1, germane is cheaper."""
    return {
        "wall_ratio": usage.wall_seconds / germane.wall_seconds,
        "cpu_ratio": usage.cpu_seconds / germane.cpu_seconds,
        "rss_ratio": usage.peak_rss_mebibytes / germane.peak_rss_mebibytes,
        "anonymous_ratio": usage.peak_anonymous_mebibytes / germane.peak_anonymous_mebibytes,
    }


def compare_pools(workdir: Path) -> list[dict[str, Any]]:
    """One row for each streaming method: its memory for a small and a large pool."""
    apart(make_pool, workdir, LARGE_POOL)
    rows, out = [], workdir / "out-germane"
    for name, settings in STREAMING.items():
        usages = {}
        for size in (SMALL_POOL, LARGE_POOL):
            pool = pool_members(workdir, size)
            remove(out)
            command = germane_command(workdir / "base", pool, settings, out)
            usages[size] = measure(f"{name}, pool of {size}", command)
        remove(out)
        small, large = usages[SMALL_POOL], usages[LARGE_POOL]
        rows.append({
            "method": name,
            "small_pool": asdict(small),
            "large_pool": asdict(large),
            "rss_ratio": large.peak_rss_mebibytes / small.peak_rss_mebibytes,
            "anonymous_ratio": large.peak_anonymous_mebibytes / small.peak_anonymous_mebibytes,
        })  # fmt: skip
    return rows


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- reporting --------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": model, "cores": os.cpu_count(), "memory_gibibytes": round(memory / 2**30)}


def versions(mergekit: Path | None) -> dict[str, str]:
    """Versions of what was measured; mergekit's come from the Python beside its command."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("germane", "torch", "safetensors")}
    if mergekit:
        ask = "import importlib.metadata as m; print(m.version('mergekit'), m.version('torch'))"
        answer = subprocess.check_output([mergekit.parent / "python", "-c", ask], text=True)
        found |= dict(zip(("mergekit", "mergekit torch"), answer.split(), strict=True))
    return found


def programs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: cost of each program, its ratio to germane's, and the weights' difference."""
    header = (
        "method", "program", "wall s", "CPU s", "RSS MiB", "anonymous MiB",
        "wall / germane", "CPU / germane", "RSS / germane", "anonymous / germane",
        "largest difference", "entries equal", "entries different", "load",
    )  # fmt: skip
    body = []
    for row in rows:
        compared = "largest" in row
        body.append((
            row["method"], row["program"], f"{row['wall_seconds']:.1f}",
            f"{row['user_seconds'] + row['system_seconds']:.1f}",
            f"{row['peak_rss_mebibytes']:.0f}", f"{row['peak_anonymous_mebibytes']:.0f}",
            *(f"{row[f'{name}_ratio']:.2f}" for name in ("wall", "cpu", "rss", "anonymous")),
            f"{row['largest']:.3g}" if compared else "",
            f"{row['share_equal']:.4%}" if compared else "",
            f"{row['share_different']:.4%}" if compared else "",
            f"{row['load_before']:.1f}",
        ))  # fmt: skip
    return markdown(header, body)


def pools_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: peak memory for the small and the large pool, and how it grew."""
    header = (
        "method",
        *(f"{kind} MiB, pool of {size}" for kind in ("RSS", "anonymous")
          for size in (SMALL_POOL, LARGE_POOL)),
        "RSS growth", "anonymous growth",
    )  # fmt: skip
    body = [
        (
            row["method"],
            *(f"{row[pool][kind]:.0f}"
              for kind in ("peak_rss_mebibytes", "peak_anonymous_mebibytes")
              for pool in ("small_pool", "large_pool")),
            f"{row['rss_ratio']:.2f}", f"{row['anonymous_ratio']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    return markdown(header, body)


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml command to compare with")
    parser.add_argument("--memory", action="store_true", help="4 checkpoints against 24, germane")
    parser.add_argument("--pool-size", type=int, default=8, help="checkpoints beside the base")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the fastest counts")
    parser.add_argument("--workdir", type=Path, help="keep the pool here, and reuse it")
    given = parser.parse_args()
    given.methods = given.methods.split(",")
    if unknown := set(given.methods) - METHODS.keys():
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}; known: {', '.join(METHODS)}")
    if given.memory == bool(given.mergekit):
        parser.error("give either --mergekit or --memory")
    return given


def main() -> None:
    """Measure, print the table, write the JSON."""
    given = arguments()
    RESULTS.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        temporary = given.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        workdir = Path(temporary).resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        if given.memory:
            rows = compare_pools(workdir)
        else:
            rows = compare_programs(workdir, given.mergekit, given.pool_size, given.methods, given.repeats)
    print(pools_table(rows) if given.memory else programs_table(rows))
    result = {"machine": machine(), "versions": versions(given.mergekit), "rows": rows}
    name = "merge-memory.json" if given.memory else "merge.json"
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
