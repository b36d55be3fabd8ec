#!/usr/bin/env python
"""Prepare a data set once, from the layout in which it is distributed to parquet shards of images and train ids.

    python scripts/prepare_domain.py cityscapes --root raw/cityscapes --out data/cityscapes --contact
    python scripts/prepare_domain.py cityscapes --root raw/cityscapes --out data/cityscapes --push-to-hub org/streets
    python scripts/prepare_domain.py custom --root mine --out data/mine --classes "road,sky,car" --id-map 7:0,23:1,26:2
    python scripts/prepare_domain.py custom --root org/name --out data/mine --classes classes.txt --id-map map.json
    python scripts/prepare_domain.py --verify --out data/cityscapes
    python scripts/prepare_domain.py --contact contact.png --out org/streets

Images keep their bytes unless --re-encode is given; labels become PNGs of train ids (255: ignored). It may be killed
and run again: finished shards stay, and the result is the same to the byte, whatever the number of workers. OUT also
gets a data-set card (README.md) and manifest.json, with the SHA-256 of every shard and the pixels of each class. Bad
samples (damaged, label of another size, values outside the map) are left out and listed there, up to --max-bad.
"custom" (or "custom:NAME") is your own data: images/ and masks/ with the same file names, within train/, validation/,
test/ if there are splits; or a Hub id or folder of parquet with columns image and label. It always gets a contact
sheet, contact.png, before anything else is written: look at it. Without --root, --contact draws what OUT, a folder or
Hub id, holds. Failure ends with one line on stderr and exit code 2, and loses nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. There is no option for a token: it would stay in the shell's history."""
    parser = argparse.ArgumentParser(
        prog="prepare_domain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("domain", nargs="?", help="such as cityscapes, or custom")
    parser.add_argument("--root", help="folder in which the data set was unpacked; custom: also a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--out", required=True, help="folder of the shards; with --contact alone also a Hub id")
    parser.add_argument("--splits", help="those to prepare, such as train,validation (default: all the domain has)")
    parser.add_argument("--classes", metavar="NAMES", help="custom: names in train-id order, a,b,c or a file of lines")
    parser.add_argument("--id-map", metavar="MAP", help="custom: stored:train ids, 7:0,8:1,0:255 or a JSON file")
    parser.add_argument("--shard-rows", type=int, default=256, metavar="N", help="images in a file (default 256)")
    parser.add_argument("--re-encode", metavar="HOW", help="png, or jpeg:QUALITY such as jpeg:95")
    parser.add_argument("--max-bad", type=float, default=0.01, metavar="SHARE", help="of each split (default 0.01)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--contact", nargs="?", const="", metavar="FILE", help="draw a sheet (OUT/contact.png)")
    parser.add_argument("--verify", action="store_true", help="check what is in OUT; prepares nothing without --root")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload OUT as a data set, private if it is new")
    parser.add_argument("--public", action="store_true", help="make a new data set public: only if its terms allow it")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Draw, prepare, verify and push, as far as asked for; raises ``InputError``."""
    from gkd_hf.data.custom_layout import is_custom, read_classes, read_id_map
    from gkd_hf.data.prepare import prepare, verify
    from gkd_hf.data.preview import contact_file, prepared_sheet, save_sheet
    from gkd_hf.errors import InputError

    out, progress = arguments.out, not arguments.quiet
    own = {"classes": read_classes(arguments.classes), "id_map": read_id_map(arguments.id_map)}
    own["revision"] = arguments.revision
    splits = arguments.splits and [name.strip() for name in arguments.splits.split(",")]
    wanted = arguments.contact is not None or (arguments.root and is_custom(arguments.domain or ""))
    contact = contact_file(out, arguments.contact, made=arguments.root is not None) if wanted else None
    if arguments.root is not None:
        if arguments.domain is None:
            raise InputError("no domain is named: give one before --root, such as cityscapes or custom")
        manifest = prepare(
            arguments.domain,
            arguments.root,
            out,
            splits=splits,
            shard_rows=arguments.shard_rows,
            re_encode=arguments.re_encode,
            max_bad=arguments.max_bad,
            workers=arguments.workers,
            contact=contact,
            progress=progress,
            **own,
        )
        print(f"{out}: {manifest.summary()}")
    elif contact is not None:
        save_sheet(prepared_sheet(out, arguments.domain, split=splits and splits[0], **own), contact)
    elif not arguments.verify and arguments.push_to_hub is None:
        raise InputError("nothing to do: give --root, where the raw data is, or --verify, --contact or --push-to-hub")
    if contact is not None:
        print(f"{contact}: look at it, whether the classes lie where they should")
    if arguments.verify:
        wrong = verify(out, progress=progress)
        if wrong:
            raise InputError(f"{out}: {'; '.join(wrong)}")
        print(f"{out}: all files are as the manifest says")
    if arguments.push_to_hub is not None:
        from gkd_hf.hub.dataset_push import push_data_set

        print(push_data_set(out, arguments.push_to_hub, private=not arguments.public, progress=progress))


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 2 where something is wrong, 130 after Ctrl-C."""
    arguments = parse(argv)
    try:
        from gkd_hf.errors import InputError, refused

        run(arguments)
    except KeyboardInterrupt:  # before the other, which may not be imported yet
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    except InputError as error:
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
