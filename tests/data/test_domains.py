from __future__ import annotations

import pytest

from gkd_hf.data.domains import BENCHMARKS, DOMAINS, LABEL_SPACES, LabelSpace, domain, label_space
from gkd_hf.errors import InputError


def test_every_domain_of_the_benchmarks_is_known():
    names = (
        "gtav synthia urbansyn cityscapes bdd100k mapillary acdc_night acdc_fog acdc_rain acdc_snow potsdam_rgb "
        "potsdam_irrg vaihingen_irrg imagenet toy_city camvid_day camvid_dusk custom"
    )
    assert set(DOMAINS) == set(names.split())
    for sources, targets in BENCHMARKS.values():
        for name in (*sources, *targets):
            assert domain(name).name == name
        assert len({domain(name).label_space for name in (*sources, *targets)}) == 1
        assert all("test" in domain(name).splits for name in targets)
        assert all("train" in domain(name).splits for name in sources)


def test_sizes_of_the_paper():
    sizes = {name: entry.test_size for name, entry in DOMAINS.items()}
    assert sizes["cityscapes"] == (1024, 512)
    assert sizes["bdd100k"] == (1280, 720)
    assert sizes["mapillary"] == (1024, 512)
    assert {sizes[f"acdc_{kind}"] for kind in ("night", "fog", "rain", "snow")} == {(960, 540)}
    assert sizes["potsdam_irrg"] == sizes["vaihingen_irrg"] == (512, 512)
    assert [name for name, entry in DOMAINS.items() if entry.keep_ratio] == ["mapillary"]
    counts = {name: len(space.classes) for name, space in LABEL_SPACES.items()}
    assert counts == {"cityscapes": 19, "isprs": 6, "camvid": 11, "toy_city": 8}
    assert label_space("gtav").classes[18] == "bicycle"
    assert label_space("camvid_dusk").classes[:5] == ("sky", "building", "pole", "road", "pavement")


def test_toy_city_styles_are_part_of_the_name():
    night = domain("toy_city:night")
    assert night.name == "toy_city:night"
    assert label_space("toy_city:night") is label_space("toy_city")
    with pytest.raises(InputError, match="names no style"):
        domain("toy_city:")


def test_unknown_names_are_explained():
    with pytest.raises(InputError, match="unknown domain 'citiscapes', did you mean 'cityscapes'"):
        domain("citiscapes")
    with pytest.raises(InputError, match="'imagenet' has no label space"):
        label_space("imagenet")
    with pytest.raises(InputError, match="'camvid_dusk' has no 'train' split; it has: test"):
        domain("camvid_dusk").split("train")
    with pytest.raises(InputError, match="2 classes but 1 colours"):
        LabelSpace("mine", ("a", "b"), ((0, 0, 0),))
