"""Run train.py or eval.py with the small network, watched, and disturbed as variables ask:

    python tests/spy.py train.py --epochs 1

SPY_NOTES      a folder: each process writes its weights at the end, and the photos it decoded
SPY_STILL      batch norm computes nothing: it would see only a process's own photos
SPY_FLAGS      flags of the second process alone
SPY_OVERFLOW   the step in which the second process's scaled loss overflows
SPY_LACKS      the second process cannot read weights
SPY_EXIT       the number of decoded photos after which the second process exits, once
SPY_KILL       the number of files written and files moved after which the process is killed
SPY_WRITE      seconds that each file takes to be written
SPY_BUFFERS    note how often buffers are broadcast, by DistributedDataParallel and for evaluations
SPY_COMPILE    compile with a backend that notes the batch sizes of the graphs, and graph breaks
SPY_FORKSERVER new processes start from a fork server by default, as in Python 3.14
"""

import functools
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import torch
from small import use_small_network

import train

RANK = os.environ.get("RANK", "0")
NOTES = Path(os.environ.get("SPY_NOTES", "."))
KILL = int(os.environ.get("SPY_KILL", 0))
EXIT = int(os.environ.get("SPY_EXIT", 0))
WRITE = float(os.environ.get("SPY_WRITE", 0))

decode_photo = train.decode_photo
build_network = train.build_network
scale = torch.amp.GradScaler.scale
write_bytes = Path.write_bytes
replace = os.replace
photos, networks, writes, steps = [], [], [], []


def still_batch_norm(layer, images):
    return images * layer.weight[:, None, None] + layer.bias[:, None, None]


def noting_decode_photo(encoded):
    photos.append(zlib.crc32(encoded))
    if RANK == "1" and len(photos) == EXIT and not (NOTES / "exited").exists():
        (NOTES / "exited").touch()
        os._exit(3)
    return decode_photo(encoded)


def noting_build_network(*args, **options):
    networks.append(build_network(*args, **options))
    return networks[-1]


def overflowing_scale(scaler, loss):
    steps.append(None)
    if len(steps) == int(os.environ["SPY_OVERFLOW"]):
        return scale(scaler, loss) * math.inf
    return scale(scaler, loss)


def killed_write_bytes(path, contents):
    time.sleep(WRITE)
    writes.append(path)
    if len(writes) == KILL:
        write_bytes(path, contents[: len(contents) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_bytes(path, contents)


def killed_replace(source, destination):
    writes.append(destination)
    if len(writes) == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, destination)


def note_buffers() -> dict:
    from torch.nn.parallel import DistributedDataParallel

    counts = {"forward": 0, "evaluation": 0}
    sync_buffers = DistributedDataParallel._sync_buffers
    broadcast_buffers = train.broadcast_buffers

    def noting_sync_buffers(network):
        counts["forward"] += 1
        sync_buffers(network)

    def noting_broadcast_buffers(network):
        counts["evaluation"] += 1
        broadcast_buffers(network)

    DistributedDataParallel._sync_buffers = noting_sync_buffers
    train.broadcast_buffers = noting_broadcast_buffers
    return counts


def note_graphs() -> list[int]:
    sizes = []
    compile_with_torch = torch.compile

    def note_sizes(graph, inputs):
        images = [value for value in inputs if value.ndim == 4 and value.shape[1] == 3]
        sizes.extend(value.shape[0] for value in images if value.shape[2] > 7)
        return graph

    torch.compile = functools.partial(compile_with_torch, backend=note_sizes)
    return sizes


if __name__ == "__main__":
    script = importlib.import_module(Path(sys.argv[1]).stem)
    sys.argv = sys.argv[1:]
    use_small_network()
    if "SPY_FORKSERVER" in os.environ:
        multiprocessing.set_start_method("forkserver", force=True)
    if "SPY_STILL" in os.environ:
        torch.nn.BatchNorm2d.forward = still_batch_norm
    if RANK == "1":
        sys.argv += os.environ.get("SPY_FLAGS", "").split()
        if "SPY_OVERFLOW" in os.environ:
            torch.amp.GradScaler.scale = overflowing_scale
        if "SPY_LACKS" in os.environ:
            train.read_checkpoint = None
    train.decode_photo = noting_decode_photo
    train.build_network = noting_build_network
    Path.write_bytes = killed_write_bytes
    os.replace = killed_replace
    buffers = note_buffers() if "SPY_BUFFERS" in os.environ else {}
    sizes = note_graphs() if "SPY_COMPILE" in os.environ else []
    train.run_command(script.main)
    if buffers:
        (NOTES / f"buffers{RANK}.json").write_text(json.dumps(buffers))
    if sizes:
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        notes = {"sizes": sizes, "breaks": breaks}
        (NOTES / f"graphs{RANK}.json").write_text(json.dumps(notes))
    if "SPY_NOTES" in os.environ:
        torch.save(networks[-1].state_dict(), NOTES / f"rank{RANK}.pth")
        (NOTES / f"rank{RANK}.json").write_text(json.dumps(photos))
