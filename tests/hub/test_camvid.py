"""Photographs as a published data set: streamed from the Hub they are what they are in their folder."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .server import LoopbackHub

REFERENCE = os.environ.get("GKD_REFERENCE_DATA")
READ = """
import hashlib, itertools, json, sys
from torch.utils.data import DataLoader
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.shards import open_rows
from gkd_hf.data.streaming import SampleStream, collate
from gkd_hf.data.transforms import SegmentationTransform

if __name__ == "__main__":
    seen = []
    for place in sys.argv[1:]:
        rows = open_rows(place, "test")
        ids = label_map("identity", 11)
        transform = SegmentationTransform(128, (0.5,) * 3, (0.5,) * 3, short_sides=(128,))
        stream = SampleStream(rows, transform, seed=0, micro_batch_size=4, shuffle=False, label_map=ids)
        loader = DataLoader(stream, batch_size=4, num_workers=2, collate_fn=collate)
        batches = list(itertools.islice(loader, -(-len(rows) // 4)))
        digests = [
            hashlib.sha256(image.numpy().tobytes() + label.numpy().tobytes()).hexdigest()
            for batch in batches for image, label in zip(batch["pixel_values"], batch["labels"])
        ]
        seen.append({"rows": len(rows), "digests": digests, "bad": [row for b in batches for row in b["bad_rows"]]})
    print(json.dumps(seen))
"""


@pytest.mark.skipif(REFERENCE is None, reason="GKD_REFERENCE_DATA is not set")
def test_camvid_streams_from_the_hub_as_from_its_folder(
    hub: LoopbackHub, hub_process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    dusk = Path(REFERENCE) / "data" / "camvid" / "dusk"
    files = {f"data/{shard.name}": shard.read_bytes() for shard in dusk.glob("*.parquet")}
    hub.add_dataset("org/camvid-dusk", files)
    script = tmp_path / "read.py"
    script.write_text(READ)
    folder, published = json.loads(hub_process(script, str(dusk), "org/camvid-dusk").stdout.splitlines()[-1])
    assert folder == published
    assert folder["bad"] == [] and len(set(folder["digests"])) > 0.9 * folder["rows"] > 50
