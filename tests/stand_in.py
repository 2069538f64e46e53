"""What `sweep.launch` starts in tests instead of Python: called with train.py and its options, it leaves behind at once
what the training would, and notes each call in calls.jsonl.

The validation loss is 1 / rank and the seconds are the rank; rank 0 is refused, rank 13 dies, rank 99 sleeps first.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    script, options = Path(sys.argv[1]).stem, dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
    call = {"script": script, "options": options, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "start": time.time()}
    if script == "train":
        train(Path("runs", options["run"]), int(options["adapter.rank"]))
    time.sleep(0.3)
    with Path("calls.jsonl").open("a") as stream:
        stream.write(json.dumps(call | {"end": time.time()}) + "\n")


def train(run: Path, rank: int) -> None:
    if rank == 0:
        print("\nerror: adapter.rank is 0; it must be 1 or more")
        sys.exit(2)
    if rank == 13:
        os.kill(os.getpid(), 9)
    if rank == 99:
        print("asleep", flush=True)
        time.sleep(60)
    (run / "adapter").mkdir(parents=True, exist_ok=True)
    events = [{"step": 0, "validation_loss": 2.0}, {"step": 1, "loss": 1.0, "seconds": rank, "memory_gib": 2.0}]
    events.append({"step": 1, "validation_loss": 1 / rank})
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"")


if __name__ == "__main__":
    main()
