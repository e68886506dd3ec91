"""Run train.py with the small network, watched, and disturbed as the environment variables ask.

SPY_NOTES      a folder: each process notes its weights at the end and the photos that it decoded
SPY_STILL      hold batch norm still, which else sees a process's own photos
SPY_FLAGS      flags of the second process alone
SPY_OVERFLOWS_AT  the step in which the second process's scaled loss overflows
SPY_LACKS      the second process can read no weights
SPY_ENDS_AT    the number of decoded photos at which the second process ends, once
SPY_KILLED_AT  the number of files written and files moved at which the process is killed
SPY_TIMEOUT    train.WORKER_TIMEOUT in seconds; a photo then takes a twentieth of it
"""

import json
import math
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import torch
from small import use_small_resnet

use_small_resnet()
import train  # noqa: E402

NOTES = Path(os.environ.get("SPY_NOTES", "."))
RANK = os.environ.get("RANK", "0")
ENDS_AT = int(os.environ.get("SPY_ENDS_AT", 0))
KILLED_AT = int(os.environ.get("SPY_KILLED_AT", 0))
TIMEOUT = float(os.environ.get("SPY_TIMEOUT", 0))

decode_photo = train.decode_photo
build_model = train.build_model
scale = torch.amp.GradScaler.scale
write_bytes = Path.write_bytes
replace = os.replace
photos, models, writes, steps = [], [], [], []


def still_batch_norm(layer, images):
    return images * layer.weight[:, None, None] + layer.bias[:, None, None]


def noting_decode_photo(encoded):
    photos.append(zlib.crc32(encoded))
    time.sleep(TIMEOUT / 20)
    if RANK == "1" and len(photos) == ENDS_AT and not (NOTES / "ended").exists():
        (NOTES / "ended").touch()
        os._exit(3)
    return decode_photo(encoded)


def noting_build_model(*args):
    models.append(build_model(*args))
    return models[-1]


def overflowing_scale(scaler, loss):
    steps.append(None)
    if len(steps) == int(os.environ["SPY_OVERFLOWS_AT"]):
        return scale(scaler, loss) * math.inf
    return scale(scaler, loss)


def killed_write_bytes(path, contents):
    writes.append(path)
    if len(writes) == KILLED_AT:
        write_bytes(path, contents[: len(contents) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_bytes(path, contents)


def killed_replace(source, destination):
    writes.append(destination)
    if len(writes) == KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, destination)


if __name__ == "__main__":
    if "SPY_STILL" in os.environ:
        torch.nn.BatchNorm2d.forward = still_batch_norm
    if RANK == "1":
        sys.argv += os.environ.get("SPY_FLAGS", "").split()
        if "SPY_OVERFLOWS_AT" in os.environ:
            torch.amp.GradScaler.scale = overflowing_scale
        if "SPY_LACKS" in os.environ:
            train.read_checkpoint = None
    train.decode_photo = noting_decode_photo
    train.build_model = noting_build_model
    train.WORKER_TIMEOUT = TIMEOUT or train.WORKER_TIMEOUT
    Path.write_bytes = killed_write_bytes
    os.replace = killed_replace
    train.run_command(train.main)
    if "SPY_NOTES" in os.environ:
        torch.save(models[-1].state_dict(), NOTES / f"rank{RANK}.pth")
        (NOTES / f"rank{RANK}.json").write_text(json.dumps(photos))
