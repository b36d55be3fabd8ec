"""The demo: its pictures and tables, the page over HTTP, the command line, and the Space it makes."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.data.domains import LABEL_SPACES
from gkd_hf.hub import space_app
from gkd_hf.hub.handler import EndpointHandler
from gkd_hf.hub.native import export_segmenter
from gkd_hf.hub.space import load_segmenters
from tests.tiny import ENCODERS

from .server import LoopbackHub

ROOT = Path(__file__).parents[2]
LEFT = ("road", "tree", "<b>person</b>")
RIGHT = ("road", "vegetation", "zebra", "sky")


def segmenter(folder: Path, labels: tuple[str, ...], seed: int) -> Path:
    """A tiny segmenter whose classes depend on the picture."""
    torch.manual_seed(seed)
    student = GKDStudentModel.from_encoder(ENCODERS["resnet"])
    model = GKDStudentForSemanticSegmentation.from_student(
        student, num_labels=len(labels), id2label=dict(enumerate(labels))
    )
    with torch.no_grad():
        model.decode_head.classifier.weight.normal_()
    export_segmenter(model, folder, image_size=32)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("demo")
    return segmenter(place / "one" / "segmenter", LEFT, 0), segmenter(place / "two" / "segmenter", RIGHT, 1)


@pytest.fixture(scope="module")
def page(folders: tuple[Path, Path]) -> Iterator[Client]:
    """A client of the running page."""
    app = space_app.build(load_segmenters([str(folder) for folder in folders]))
    _, url, _ = space_app.launch(app, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False, analytics_enabled=False)
    app.close()


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """scripts/demo.py as a module."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((90, 60), Image.Resampling.NEAREST).save(tmp_path / "street.png")
    return tmp_path / "street.png"


def shares_of(table: str) -> dict[str, float]:
    """Class name → percent, as the legend's HTML says."""
    found = re.findall(r'class="name">([^<]*)</td>.*?class="share">(?:&lt; |< )?([\d.]+) %', table)
    return {name: float(share) for name, share in found}


def test_overlay_mixes_colours_and_marks_borders() -> None:
    image = Image.new("RGB", (4, 2), (100, 100, 100))
    classes = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    mixed = np.asarray(space_app.overlay(image, classes, [(200, 0, 0), (0, 0, 200)], 0.25))
    assert mixed[0, 0].tolist() == [125, 75, 75]
    assert mixed[0, 3].tolist() == [75, 75, 125]
    assert mixed[0, 2].min() > 125  # the line between the classes is lighter than either
    assert (np.asarray(space_app.overlay(image, classes, [(200, 0, 0), (0, 0, 200)], 0)) == 100).all()


def test_areas_sum_to_the_picture() -> None:
    classes = np.array([[2, 2, 2], [0, 0, 2]])
    shares = space_app.areas(classes, ["a", "b", "c"])
    assert list(shares) == ["c", "a", "b"]
    assert shares == {"c": pytest.approx(400 / 6), "a": pytest.approx(200 / 6), "b": 0}


def test_legend_names_colours_and_areas_and_trusts_no_name() -> None:
    colours = {"road": (1, 2, 3), "<script>": (4, 5, 6), "sky": (7, 8, 9)}
    table = space_app.legend({"road": 99.99, "<script>": 0.01, "sky": 0.0}, colours)
    assert "rgb(1, 2, 3)" in table and "100.0 %" in table and "< 0.1 %" in table
    assert "&lt;script&gt;" in table and "<script>" not in table
    assert "not seen: sky" in table and "rgb(7, 8, 9)" not in table


def test_palette_is_cityscapes_for_its_classes() -> None:
    space = LABEL_SPACES["cityscapes"]
    assert space_app.palette(space.classes) == dict(zip(space.classes, space.palette, strict=True))
    camvid = space_app.palette(LABEL_SPACES["camvid"].classes)
    assert camvid["tree"] == space_app.palette(["vegetation"])["vegetation"]
    assert camvid["bicyclist"] == space.palette[space.classes.index("rider")]


def test_palette_tells_other_classes_apart() -> None:
    names = [f"thing {number}" for number in range(50)]
    colours = space_app.palette(names)
    assert len(set(colours.values())) == 50
    assert space_app.palette(names) == colours
    alone, among = space_app.palette(["zebra"]), space_app.palette(["road", "zebra", "road"])
    assert among["zebra"] == alone["zebra"] and list(among) == ["road", "zebra"]


def test_disagreement_compares_what_names_mean() -> None:
    image = Image.new("RGB", (4, 1), (50, 50, 50))
    left, right = np.array([[0, 1, 1, 0]]), np.array([[1, 0, 0, 0]])
    picture, text = space_app.disagreement(image, left, right, ["road", "tree"], ["vegetation", "road"])
    pixels = np.asarray(picture)[0].astype(int)
    # road/road, tree/vegetation, tree/vegetation, road/vegetation: only the last differs.
    assert [abs(pixel[0] - pixel[2]) > 50 for pixel in pixels] == [False, False, False, True]
    assert "<b>25.0 %</b>" in text and re.search(r"<td>road</td><td>vegetation</td>.*25\.0 %", text)
    _, text = space_app.disagreement(image, left, left, ["road", "tree"], ["road", "tree"])
    assert "agree everywhere" in text


@pytest.mark.parametrize(
    ("size", "shown"), [((64, 32), (640, 320)), ((800, 600), (800, 600)), ((4000, 2000), (1280, 640))]
)
def test_pictures_are_shown_at_a_size_to_look_at(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert space_app.shown_size(Image.new("L", size)).size == shown


def test_prediction_is_remembered(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = load_segmenters([str(folders[0])])
    calls = []
    predict = one.predict
    monkeypatch.setattr(one, "predict", lambda image: calls.append(image) or predict(image))
    predictions = space_app.Predictions([one])
    first, second = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 40), "red")
    for image in (first, first.copy(), second):
        assert predictions.of("one", image).shape == image.size[::-1]
    assert len(calls) == 2  # of the same bytes, but another shape


def test_page_segments_and_switches_models(page: Client, folders: tuple[Path, Path], picture: Path) -> None:
    both = page.predict(handle_file(picture), 50, "one", "two", api_name="/segment")
    assert [Image.open(both[index]).size for index in (0, 2, 4)] == [(640, 427)] * 3
    left, right = shares_of(both[1]), shares_of(both[3])
    assert set(left) <= {"road", "tree", "&lt;b&gt;person&lt;/b&gt;"} and set(right) <= set(RIGHT)
    assert sum(left.values()) == pytest.approx(100, abs=0.3) and sum(right.values()) == pytest.approx(100, abs=0.3)
    # What the model says, without the page.
    (one,) = load_segmenters([str(folders[0])])
    expected = space_app.areas(one.predict(space_app.shown_size(Image.open(picture))), LEFT)
    assert left.get("road", 0) == pytest.approx(expected["road"], abs=0.06)
    assert "disagree on" in both[5]

    switched = page.predict(handle_file(picture), 50, "two", "two", api_name="/segment")
    assert shares_of(switched[1]) == right == shares_of(switched[3])
    assert "agree everywhere" in switched[5]


def test_opacity_changes_the_overlay(page: Client, picture: Path) -> None:
    def left(opacity: int) -> np.ndarray:
        answer = page.predict(handle_file(picture), opacity, "one", "two", api_name="/segment")[0]
        return np.asarray(Image.open(answer).convert("RGB")).astype(int)

    shown = np.asarray(space_app.shown_size(Image.open(picture))).astype(int)
    none, some, much = (np.abs(left(opacity) - shown).mean() for opacity in (0, 40, 80))
    assert none < 1 < some < much


def test_no_picture_clears_the_page(page: Client) -> None:
    assert page.predict(None, 50, "one", "two", api_name="/segment") == (None, "") * 3


def test_page_itself_asks_nobody_else(page: Client) -> None:
    import httpx

    config = httpx.get(f"{page.src}config").json()
    assert config["analytics_enabled"] is False
    assert config["is_colab"] is False and not config.get("share_url")
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+)"', httpx.get(page.src).text)
    assert [link for link in loaded if "127.0.0.1" not in link] == []


def test_no_segmenter_there(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert demo.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line and "no semantic segmenter" in line


def test_no_preprocessor(demo: ModuleType, folders: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders[0] / name).read_bytes())
    assert demo.main([str(tmp_path)]) == 2
    assert "has no preprocessor_config.json" in capsys.readouterr().err


def test_examples_without_pictures(demo: ModuleType, folders: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    assert demo.main([str(folders[0]), "--examples", str(tmp_path)]) == 2
    assert "there are no pictures" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "-1", "99999"])
def test_port_that_there_is_not(demo: ModuleType, folders: tuple[Path, Path], port: str, capsys) -> None:
    assert demo.main([str(folders[0]), "--port", port]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"there is no port {port}: --port takes 1 to 65535" in line


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A native segmenter whose preprocessor comes with code."""
    folder = tmp_path / "evil"
    student = GKDStudentModel.from_encoder(ENCODERS["resnet"])
    head = {"type": "upernet", "hidden_size": 16}
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3, decode_head=head)
    assert export_segmenter(model, folder, image_size=32).native
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(
        "from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Evil(SegformerImageProcessorPil): pass\n"
    )
    return folder


@pytest.mark.parametrize("answer", ["", "y\n"], ids=["closed", "yes"])
def test_a_preprocessors_code_is_not_run_unasked(
    evil: Path, answer: str, demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Nor is anybody asked on the terminal."""
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert demo.main([str(evil)]) == 2
    said = capsys.readouterr()
    assert f"the preprocessor of '{evil}' comes with code of its own" in said.err and "--trust-remote-code" in said.err
    with pytest.raises(ValueError, match="trust_remote_code"):
        space_app.Segmenter.load(str(evil))
    with pytest.raises(ValueError, match="trust_remote_code"):
        EndpointHandler(str(evil))
    assert "[y/N]" not in said.out + capsys.readouterr().out
    assert sys.stdin.read() == answer and not (evil.parent / "ran").exists()


def test_a_preprocessors_code_can_be_trusted(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (loaded,) = load_segmenters([str(evil)], trust_remote_code=True)
    assert type(loaded.processor).__name__ == "Evil" and (evil.parent / "ran").exists()


def test_broken_preprocessor(demo: ModuleType, folders: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders[0] / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text("{")
    assert demo.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot read the preprocessor of '{tmp_path}'" in line


def test_examples_are_shown_whole_and_chosen_at_their_own_size(folders: tuple[Path, Path], tmp_path: Path) -> None:
    Image.new("RGB", (900, 300), (10, 200, 30)).save(tmp_path / "wide.png")
    Image.new("RGB", (40, 60), (10, 200, 30)).save(tmp_path / "lying.jpg", exif=turned())
    examples = [tmp_path / "wide.png", tmp_path / "lying.jpg"]
    page = space_app.build(load_segmenters([str(folders[0])]), examples)
    (gallery,) = (block for block in page.blocks.values() if isinstance(block, gr.Gallery))
    sizes = [Image.open(item["image"]["path"]).size for item in gallery.value]
    assert sizes == [(320, 107), (60, 40)] and gallery.object_fit == "contain"
    (choose,) = (event.fn for event in page.fns.values() if "select" in [name for _, name in event.targets])
    for index, size in enumerate([(900, 300), (60, 40)]):
        assert choose(gr.SelectData(None, {"index": index, "value": None})).size == size


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera held sideways
    return exif


def test_port_that_is_taken(demo: ModuleType, folders: tuple[Path, Path], picture: Path, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo.main([str(folders[0]), "--examples", str(picture.parent), "--port", str(port)]) == 2
    assert f"cannot serve on port {port}, choose another with --port" in capsys.readouterr().err


def test_folders_cannot_go_into_a_space(
    demo: ModuleType, folders: tuple[Path, Path], picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folders[0]), "--examples", str(picture.parent), "--push-space", "org/demo"]
    assert demo.main(arguments) == 2
    assert "is a folder: push it first" in capsys.readouterr().err


def test_space_holds_all_it_needs(
    hub: LoopbackHub,
    hub_process: Callable[..., subprocess.CompletedProcess[str]],
    folders: tuple[Path, Path],
    picture: Path,
    tmp_path: Path,
) -> None:
    hub.add_model("org/one", folders[0])
    command = ["org/one", "--examples", str(picture.parent), "--push-space", "org/demo"]
    done = hub_process(
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import demo\n"
        f"assert demo.main({command!r}) == 2\n"
        f"assert demo.main([*{command!r}, '--trust-remote-code']) == 0"
    )
    assert "'org/one' comes with code of its own: allow the Space to run it" in done.stderr
    assert done.stdout.strip().endswith("/spaces/org/demo")
    repo = hub.repos["space", "org/demo"]
    assert repo.private and len(repo.commits) <= 2  # the Hub's own first one and this one
    files = repo.files()
    assert files["app.py"] == Path(space_app.__file__).read_bytes()
    commit = hub.repos["model", "org/one"].commits[-1].oid
    pinned = [{"id": "org/one", "revision": commit}]
    assert json.loads(files["models.json"]) == {"models": pinned, "trust_remote_code": True}
    assert files["examples/street.png"] == picture.read_bytes()
    card = files["README.md"].decode()
    assert "sdk: gradio" in card and "app_file: app.py" in card and "- org/one" in card

    # What the model becomes later does not come into the Space by itself.
    hub.add_model("org/one", {"config.json": b"{", "modeling_gkd.py": b"raise SystemExit('run unseen')"})
    # The files by themselves are an app: it loads the model from the Hub and is ready to serve.
    space = tmp_path / "space"
    for name, content in files.items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(content)
    program = (
        "import sys; sys.path.insert(0, 'space')\n"
        "import app\n"
        "app.launch = lambda page: print('page of', page.title, len(page.fns))\n"
        "app.main()\n"
        "assert 'gkd_hf' not in sys.modules"
    )
    started = hub_process(program, PYTHONPATH="")
    assert "page of Segmenters side by side" in started.stdout
