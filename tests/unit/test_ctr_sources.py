"""KuaiRand, KuaiVideo_x1, TaobaoAd_x1, Ali-CCP and Criteo_x4 from a few lines of each."""

from __future__ import annotations

import gzip
import importlib.util
import io
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from recsys.artifacts import Workspace
from recsys.data.engines import connected
from recsys.data.examples import impressions
from recsys.data.prepare import PrepareSettings, prepare
from recsys.data.sources.ali_ccp import AliCcp
from recsys.data.sources.criteo import Criteo
from recsys.data.sources.kuairand import KuaiRand
from recsys.data.sources.kuaivideo import KuaiVideo
from recsys.data.sources.taobao_ad import TaobaoAd
from recsys.features.columns import declare
from recsys.schema import InputError

CONFIGS = Path(__file__).parents[2] / "configs"


class Rows(NamedTuple):
    """The tables of a source, as plain rows in the order of `row`."""

    impressions: list[dict]
    events: list[dict]
    items: dict[str, dict]
    users: dict[str, dict]
    has_time: bool
    labels: tuple[str, ...]
    dropped: Mapping[str, int]


def rows(source: Any, path: Path, tmp_path: Path) -> Rows:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    with connected(PrepareSettings("ctr"), scratch) as con:
        tables = source.read(con, path, scratch)
        assert tables.impressions is not None
        items, users = ([] if t is None else plain(t) for t in (tables.items, tables.users))
        return Rows(
            plain(tables.impressions.order_by("row")),
            plain(tables.events.order_by("row", "event_type")),
            {row.pop("item_id"): row for row in items},
            {row.pop("user_id"): row for row in users},
            tables.has_time,
            tuple(tables.labels),
            tables.dropped,
        )


def plain(table: Any) -> list[dict]:
    return table.to_pyarrow().to_pylist()


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return path


def refused(source: Any, path: Path, tmp_path: Path) -> str:
    with pytest.raises(InputError) as caught:
        rows(source, path, tmp_path)
    return str(caught.value)


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# KuaiRand

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)
ONE_HOT = ",".join(f"onehot_feat{place}" for place in range(18))
PEOPLE = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    "follow_user_num,follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,"
    f"friend_user_num_range,register_days,register_days_range,{ONE_HOT}"
)
VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag"
)


def kuairand(tmp_path: Path) -> Path:
    data = tmp_path / "KuaiRand-Pure" / "data"
    write(
        data / "log_standard_4_08_to_4_21_pure.csv",
        LOG,
        "3,1071,20220408,1600,1649408076860,1,1,0,0,0,0,1,175045,87433,0,0,0,0,1",
        "3,10,20220411,1900,1649675512388,0,0,0,0,0,0,0,1385,209900,0,0,0,0,0",
    )
    write(
        data / "log_standard_4_22_to_5_08_pure.csv",
        LOG,
        "4,10,20220422,400,1650571401301,1,0,1,0,0,0,0,7500,209900,0,0,1,0,4",
    )
    write(
        data / "log_random_4_22_to_5_08_pure.csv",
        LOG,
        "4,1071,20220422,500,1650575001301,0,0,0,0,0,1,0,0,87433,0,0,0,1,1",
    )
    hot = ",".join("1" for _ in range(17))
    write(
        data / "user_features_pure.csv",
        PEOPLE,
        f'3,full_active,0,0,1,5,"(0,10]",312,"[100,1k)",0,0,3624,730+,1,{hot}',
        f"4,high_active,0,0,0,0,0,0,0,0,0,20,15-30,,{hot}",
    )
    write(
        data / "video_features_basic_pure.csv",
        VIDEOS,
        '10,441,NORMAL,2020-07-08,ShortImport,0.0,17200.0,720.0,1280.0,989206467,4.0,"12,65"',
        "1071,7,AD,,Web,0.0,,720.0,1280.0,,9.0,",
    )
    write(data / "video_features_statistic_pure.csv", "video_id,counts,show_cnt", "10,66,75.212")
    return tmp_path / "KuaiRand-Pure"


def test_kuairand(tmp_path: Path) -> None:
    read = rows(KuaiRand(labels=("click", "hate", "dwell")), kuairand(tmp_path), tmp_path)
    assert read.has_time
    assert read.labels == ("click", "hate", "dwell")
    assert read.impressions[0] == {
        "user_id": "3",
        "item_id": "1071",
        "timestamp": 1_649_408_076_860,
        "click": 1.0,
        "hate": 0.0,
        "dwell": 175.045,
        "tab": "1",
        "is_rand": "0",
        "row": 0,
    }
    assert [row["is_rand"] for row in read.impressions] == ["0", "0", "0", "1"]
    assert [row["row"] for row in read.impressions] == [0, 1, 2, 3]
    said = [(e["user_id"], e["item_id"], e["event_type"], e["value"]) for e in read.events]
    assert said == [
        ("3", "1071", "favourite", None),
        ("3", "1071", "view", pytest.approx(175.045)),
        ("4", "10", "view", 7.5),
    ]


def test_kuairand_features_and_what_tells_of_the_time_after(tmp_path: Path) -> None:
    read = rows(KuaiRand(), kuairand(tmp_path), tmp_path)
    assert read.items["10"] == {
        "author_id": "441",
        "video_type": "NORMAL",
        "upload_type": "ShortImport",
        "music_id": "989206467",
        "music_type": "4.0",
        "video_duration": 17200.0,
        "server_width": 720.0,
        "server_height": 1280.0,
        "upload_day": 18451.0,
        "tags": ["12", "65"],
    }
    assert read.items["1071"]["upload_day"] is None
    assert read.items["1071"]["tags"] == []
    assert not any("status" in name or "cnt" in name for name in read.items["10"])
    assert read.users["3"]["follow_user_num_range"] == "(0,10]"
    assert read.users["3"]["register_days"] == 3624.0
    assert read.users["4"]["onehot_feat0"] is None
    assert set(read.impressions[0]) >= set(read.labels)
    assert "dwell" not in read.impressions[0]


def test_kuairand_without_the_random_log(tmp_path: Path) -> None:
    path = kuairand(tmp_path)
    (path / "data" / "log_random_4_22_to_5_08_pure.csv").unlink()
    assert len(rows(KuaiRand(random=False), path, tmp_path).impressions) == 3
    message = refused(KuaiRand(), path, tmp_path)
    assert "no log_random_4_22_to_5_08_*.csv in it; found log_standard_4_08" in message
    assert "python scripts/download.py kuairand-pure" in message


def test_kuairand_in_parts_as_the_largest_version_comes(tmp_path: Path) -> None:
    data = kuairand(tmp_path) / "data"
    whole = data / "log_standard_4_08_to_4_21_pure.csv"
    head, first, second = whole.read_text().splitlines()
    whole.unlink()
    write(data / "log_standard_4_08_to_4_21_27k_part1.csv", head, first)
    write(data / "log_standard_4_08_to_4_21_27k_part2.csv.gz", head, second)
    read = rows(KuaiRand(), data, tmp_path)
    assert [row["item_id"] for row in read.impressions] == ["1071", "10", "10", "1071"]
    assert [row["row"] for row in read.impressions] == [0, 1, 2, 3]


# KuaiVideo_x1

KUAIVIDEO = "timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items"


def kuaivideo(tmp_path: Path) -> Path:
    folder = tmp_path / "KuaiVideo_x1"
    write(
        folder / "train.csv",
        KUAIVIDEO,
        "761105059450,0,11,1,0,0,,",
        "761105069450,0,12,0,0,0,11,",
        "761105079450,0,13,1,1,0,11,12",
    )
    write(folder / "test.csv", KUAIVIDEO, "761105089450,0,14,1,0,1,11^13,12")
    keys, values = np.arange(15), np.arange(30, dtype=np.float32).reshape(15, 2)
    np.savez(folder / "item_visual_emb_dim64.npz", key=keys, value=values)
    return folder


def test_kuaivideo(tmp_path: Path) -> None:
    read = rows(KuaiVideo(), kuaivideo(tmp_path), tmp_path)
    assert read.labels == ("click", "like", "follow")
    assert read.impressions[3] == {
        "user_id": "0",
        "item_id": "14",
        "timestamp": 761_105_089_450,
        "click": 1.0,
        "like": 0.0,
        "follow": 1.0,
        "pos_items": ["11", "13"],
        "neg_items": ["12"],
        "part": "test",
        "row": 3,
    }
    assert [row["part"] for row in read.impressions] == ["train", "train", "train", "test"]
    assert read.impressions[0]["pos_items"] == []
    assert read.items["14"] == {"picture": [28.0, 29.0]}


def test_kuaivideo_histories_hold_no_test_click(tmp_path: Path) -> None:
    read = rows(KuaiVideo(), kuaivideo(tmp_path), tmp_path)
    assert [(e["item_id"], e["event_type"]) for e in read.events] == [
        ("11", "view"),
        ("13", "favourite"),
        ("13", "view"),
    ]


def test_kuaivideo_shorter_or_without(tmp_path: Path) -> None:
    path = kuaivideo(tmp_path)
    short = rows(KuaiVideo(sequences=1), path, tmp_path)
    assert short.impressions[3]["pos_items"] == ["11"]
    bare = rows(KuaiVideo(sequences=0, vectors=False), path, tmp_path)
    assert "pos_items" not in bare.impressions[0]
    assert bare.items == {}


def test_kuaivideo_vectors_from_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = kuaivideo(tmp_path)
    with h5py.File(path / "item_visual_emb_dim64.h5", "w") as file:
        file.create_dataset("key", data=[11, 14])
        file.create_dataset("value", data=[[1.0, 2.0], [3.0, 4.0]])
    read = rows(KuaiVideo(), path, tmp_path)
    assert read.items == {"11": {"picture": [1.0, 2.0]}, "14": {"picture": [3.0, 4.0]}}


def test_bad_vectors(tmp_path: Path) -> None:
    path = kuaivideo(tmp_path)
    file = path / "item_visual_emb_dim64.npz"
    np.savez(file, key=np.arange(3), value=np.zeros((2, 4)))
    assert "key is (3,) and value (2, 4); expected [N] ids" in refused(KuaiVideo(), path, tmp_path)
    np.savez(file, ids=np.arange(3))
    assert "no array 'key'; found ids. Expected key, value" in refused(KuaiVideo(), path, tmp_path)
    file.write_bytes(b"nonsense")
    assert "cannot be read" in refused(KuaiVideo(), path, tmp_path)
    file.unlink()
    assert "data.source.vectors=false" in refused(KuaiVideo(), path, tmp_path)


# TaobaoAd_x1, and the raw files

TAOBAO = (
    "clk,btag_his,cate_his,brand_his,userid,cms_segid,cms_group_id,final_gender_code,age_level,"
    "pvalue_level,shopping_level,occupation,new_user_class_level,adgroup_id,cate_id,campaign_id,"
    "customer,brand,price,pid,btag"
)


def taobao_x1(tmp_path: Path) -> Path:
    folder = tmp_path / "TaobaoAd_x1"
    write(
        folder / "train.csv",
        TAOBAO,
        "0,1^1^3,6261^4520^4520,91286^0^7,1122,8,5,2,5,0,3,1,3,5,6261,83237,1,95471,170.0,1,1",
        "1,,,,1122,8,5,2,5,0,3,1,3,6,4520,5,2,0,12.5,2,1",
    )
    write(
        folder / "test.csv",
        TAOBAO,
        "0,1,6261,91286,7,0,0,0,0,0,0,0,0,5,6261,83237,1,95471,170.0,1,1",
    )
    return folder


def test_taobao_ad_x1(tmp_path: Path) -> None:
    read = rows(TaobaoAd(sequences=2), taobao_x1(tmp_path), tmp_path)
    assert not read.has_time
    assert read.events == []
    assert read.impressions[0] == {
        "user_id": "1122",
        "item_id": "5",
        "timestamp": 0,
        "click": 0.0,
        "btag_his": ["1", "1"],
        "cate_his": ["6261", "4520"],
        "brand_his": ["91286", "0"],
        "userid": "1122",
        "cms_segid": "8",
        "cms_group_id": "5",
        "final_gender_code": "2",
        "age_level": "5",
        "pvalue_level": "0",
        "shopping_level": "3",
        "occupation": "1",
        "new_user_class_level": "3",
        "cate_id": "6261",
        "campaign_id": "83237",
        "customer": "1",
        "brand": "95471",
        "price": 170.0,
        "pid": "1",
        "btag": "1",
        "part": "train",
        "row": 0,
    }
    assert [(row["part"], row["timestamp"], row["click"]) for row in read.impressions] == [
        ("train", 0, 0.0),
        ("train", 1, 1.0),
        ("test", 2, 0.0),
    ]
    assert read.impressions[1]["btag_his"] == []


def taobao_raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    write(
        folder / "raw_sample.csv",
        "user,time_stamp,adgroup_id,pid,nonclk,clk",
        "581738,1494137644,1,430548_1007,1,0",
        "449818,1494604799,3,430548_1007,0,1",
        "449818,1494604800,3,430539_1007,1,0",
    )
    write(
        folder / "ad_feature.csv",
        "adgroup_id,cate_id,campaign_id,customer,brand,price",
        "1,6406,83237,1,95471,170.0",
        "3,6406,83237,1,NULL,0.01",
    )
    write(
        folder / "user_profile.csv",
        "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,"
        "occupation,new_user_class_level ",
        "449818,0,5,2,5,,3,0,3",
    )
    write(
        folder / "behavior_log.csv",
        "user,time_stamp,btag,cate,brand",
        "449818,1493741625,pv,6406,95471",
        "449818,1493741626,buy,6406,95471",
        "449818,1493741627,fav,12,0",
    )
    return folder


def test_taobao_ad_raw_has_behaviours_before(tmp_path: Path) -> None:
    read = rows(TaobaoAd(), taobao_raw(tmp_path), tmp_path)
    assert read.has_time
    assert [row["part"] for row in read.impressions] == ["train", "train", "test"]
    assert read.impressions[1]["timestamp"] == 1_494_604_799_000
    assert [(e["item_id"], e["event_type"], e["timestamp"]) for e in read.events] == [
        ("cate 6406 brand 95471", "view", 1_493_741_625_000),
        ("cate 6406 brand 95471", "purchase", 1_493_741_626_000),
        ("cate 12 brand 0", "favourite", 1_493_741_627_000),
    ]
    assert read.items["3"]["brand"] is None
    assert read.items["cate 6406 brand 95471"]["cate_id"] == read.items["1"]["cate_id"]
    assert read.items["cate 6406 brand 95471"]["price"] is None
    assert read.users["449818"]["new_user_class_level"] == "3"
    assert read.users["449818"]["pvalue_level"] is None


def test_taobao_ad_raw_without_behaviours(tmp_path: Path) -> None:
    path = taobao_raw(tmp_path)
    (path / "behavior_log.csv").unlink()
    read = rows(TaobaoAd(), path, tmp_path)
    assert read.events == []
    assert set(read.items) == {"1", "3"}


# Ali-CCP


def features(*entries: tuple[str, str, str]) -> str:
    return "\x01".join(f"{field}\x02{one}\x03{value}" for field, one, value in entries)


ITEM = (
    ("205", "4238118", "1.0"),
    ("206", "4316053", "1.0"),
    ("207", "4326911", "1.0"),
    ("210", "9041936", "1.0"),
    ("216", "9138377", "1.0"),
    ("508", "9355831", "2.70805"),
    ("853", "9355840", "1.0"),
    ("853", "9355841", "1.0"),
    ("301", "9351665", "1.0"),
)
PERSON = (
    ("101", "31319", "1.0"),
    ("121", "3438658", "1.0"),
    ("109_14", "4313900", "0.69315"),
    ("109_14", "4313901", "2.19722"),
    ("124", "3438769", "1.0"),
    ("129", "3864885", "1.0"),
)


def ali_ccp(tmp_path: Path) -> Path:
    folder = tmp_path / "ali"
    for part in ("train", "test"):
        write(
            folder / f"sample_skeleton_{part}.csv",
            f"1,0,0,bacff91692951881,{len(ITEM)},{features(*ITEM)}",
            f"2,1,1,bacff91692951881,1,{features(ITEM[0])}",
            f"3,0,1,bacff91692951881,1,{features(ITEM[0])}",
        )
        write(
            folder / f"common_features_{part}.csv",
            f"bacff91692951881,{len(PERSON)},{features(*PERSON)}",
        )
    return folder


def test_ali_ccp(tmp_path: Path) -> None:
    read = rows(AliCcp(), ali_ccp(tmp_path), tmp_path)
    assert read.labels == ("click", "purchase")
    assert read.dropped == {"bought_without_click": 2}
    first = read.impressions[0]
    assert first == {
        "user_id": "31319",
        "item_id": "4238118",
        "timestamp": 0,
        "click": 0.0,
        "purchase": 0.0,
        "person": "31319",
        "profile": "3438658",
        "profile_group": None,
        "gender": "3438769",
        "age": None,
        "spending": None,
        "spending_level": None,
        "works": None,
        "geography": "3864885",
        "category": "4316053",
        "shop": "4326911",
        "brand": "9138377",
        "category_crossed": "9355831",
        "shop_crossed": None,
        "brand_crossed": None,
        "intention_crossed": "9355841",
        "scene": "9351665",
        "part": "train",
        "row": 0,
    }
    said = [(r["part"], r["click"], r["purchase"], r["timestamp"]) for r in read.impressions]
    assert said == [
        ("train", 0, 0, 0),
        ("train", 1, 1, 1),
        ("test", 0, 0, 3),
        ("test", 1, 1, 4),
    ]


def test_ali_ccp_some_training_samples_validate(tmp_path: Path) -> None:
    read = rows(AliCcp(validation_every=2), ali_ccp(tmp_path), tmp_path)
    assert [row["part"] for row in read.impressions] == ["train", "validation", "test", "test"]


def test_ali_ccp_histories_are_the_weightiest_first(tmp_path: Path) -> None:
    path = ali_ccp(tmp_path)
    seen = [
        rows(AliCcp(histories=most), path, tmp_path).impressions[0]["categories_seen"]
        for most in (1, 5)
    ]
    assert seen == [["4313901"], ["4313901", "4313900"]]


# Criteo_x4, and the competition's file

HEAD = ",".join(("Label", *(f"I{n}" for n in range(1, 14)), *(f"C{n}" for n in range(1, 27))))
CODES = "68fd1e64,80e26c9b,fb936136,7b4723c4,25c83c98,7e0ccccf,de7995b8,1f89b562,a73ee510"
CODES += ",a8cd5504,b2cb9c98,37c9c164,2824a5f6,1adce6ef,8ba8b39a,891b62e7,e5ba7672,f54016b9"
CODES += ",21ddcdc9,b1252a9d,07b5194c,,3a171ecb,c5c50484,e8b83407,9727dd16"
ADVERT = f"0,1,1,5,0,1382,4,15,2,181,1,2,,2,{CODES}"


def criteo(tmp_path: Path) -> Path:
    folder = tmp_path / "Criteo_x4"
    write(folder / "train.csv", HEAD, ADVERT, ADVERT.replace("0,1,1", "1,-1,", 1))
    write(folder / "valid.csv", HEAD, ADVERT)
    write(folder / "test.csv", HEAD, ADVERT)
    return folder


def test_criteo_x4(tmp_path: Path) -> None:
    read = rows(Criteo(), criteo(tmp_path), tmp_path)
    assert read.labels == ("click",)
    assert [row["part"] for row in read.impressions] == ["train", "train", "validation", "test"]
    assert [row["timestamp"] for row in read.impressions] == [0, 1, 2, 3]
    assert [row["click"] for row in read.impressions] == [0, 1, 0, 0]
    first = read.impressions[0]
    assert first["user_id"] is None
    assert first["item_id"] is None
    # ⌊ln² 1382⌋ = ⌊7.2313²⌋, ⌊ln² 5⌋, ⌊ln² 4⌋, ⌊ln² 15⌋, ⌊ln² 181⌋; up to 2 they stay.
    assert [first[f"I{n}"] for n in range(1, 14)] == [
        *("1", "1", "2", "0", "52", "1", "7", "2", "27", "1", "2", "0", "2")
    ]
    assert read.impressions[1]["I1"] == "-1"
    assert read.impressions[1]["I2"] == "0"
    assert first["C1"] == "68fd1e64"
    assert first["C22"] is None
    assert read.events == []


def test_criteo_numbers_as_they_are(tmp_path: Path) -> None:
    first = rows(Criteo(buckets=False), criteo(tmp_path), tmp_path).impressions[0]
    assert (first["I5"], first["I12"]) == (1382.0, None)


def test_criteo_of_the_competition_is_not_split(tmp_path: Path) -> None:
    file = write(tmp_path / "dac" / "train.txt", ADVERT.replace(",", "\t"))
    for path in (file, file.parent):
        read = rows(Criteo(), path, tmp_path)
        assert "part" not in read.impressions[0]
        assert read.impressions[0]["C26"] == "9727dd16"


# Bad files

BAD: list[tuple[Callable[[Path], Path], Any, str, str, str, str]] = [
    (
        kuairand,
        KuaiRand(),
        "data/log_standard_4_08_to_4_21_pure.csv",
        ",1,1,0,0,0,0,1,175045",
        ",2,1,0,0,0,0,1,175045",
        "pure.csv: row 1: is_click is '2'; expected 0 or 1",
    ),
    (
        kuairand,
        KuaiRand(),
        "data/log_standard_4_08_to_4_21_pure.csv",
        "175045",
        "-1",
        "pure.csv: row 1: play_time_ms is '-1'; expected a number, 0 or more, or nothing",
    ),
    (
        kuairand,
        KuaiRand(),
        "data/log_standard_4_08_to_4_21_pure.csv",
        "1649675512388",
        "noon",
        "row 2: time_ms is 'noon'; expected a whole number",
    ),
    (
        kuairand,
        KuaiRand(),
        "data/log_standard_4_08_to_4_21_pure.csv",
        "3,10,",
        ",10,",
        "row 2: user_id is empty",
    ),
    (
        kuairand,
        KuaiRand(),
        "data/user_features_pure.csv",
        "3624",
        "long",
        "user_features_pure.csv: row 1: register_days is 'long'; expected a number",
    ),
    (
        kuairand,
        KuaiRand(),
        "data/video_features_basic_pure.csv",
        "2020-07-08",
        "2020-07-48",
        "row 1: upload_dt is '2020-07-48'; expected YYYY-MM-DD",
    ),
    (
        kuairand,
        KuaiRand(),
        "data/video_features_basic_pure.csv",
        ",tag",
        ",tags",
        "no column 'tag'; found video_id, author_id",
    ),
    (
        kuaivideo,
        KuaiVideo(),
        "test.csv",
        ",1,0,1,",
        ",1,0,1,9,",
        "Expected Number of Columns: 8 Found: 9",
    ),
    (kuaivideo, KuaiVideo(), "train.csv", "761105069450", "", "row 2: timestamp is empty"),
    (
        taobao_x1,
        TaobaoAd(),
        "train.csv",
        "170.0",
        "dear",
        "train.csv: row 1: price is 'dear'; expected a number, or nothing",
    ),
    (taobao_x1, TaobaoAd(), "test.csv", "clk,", "click,", "no column 'clk'; found click, btag_his"),
    (
        taobao_raw,
        TaobaoAd(),
        "behavior_log.csv",
        "buy",
        "sell",
        "behavior_log.csv: row 2: btag is 'sell'; known are view",
    ),
    (
        taobao_raw,
        TaobaoAd(),
        "ad_feature.csv",
        ",95471,170.0",
        ",95471",
        "Expected Number of Columns: 6 Found: 5",
    ),
    (
        ali_ccp,
        AliCcp(),
        "sample_skeleton_test.csv",
        "2,1,1,bac",
        "2,1,1,fff",
        "sample_skeleton_test.csv: row 2: common is 'fffff91692951881'; expected a row of it in "
        "common_features_test.csv",
    ),
    (
        ali_ccp,
        AliCcp(),
        "sample_skeleton_train.csv",
        "1,0,0,bac",
        "1,,0,bac",
        "sample_skeleton_train.csv: row 1: click is empty; expected 0 or 1",
    ),
    (
        ali_ccp,
        AliCcp(),
        "common_features_train.csv",
        "81,6,",
        "81,7,",
        "common_features_train.csv: row 1: count is '7'; expected how many features follow",
    ),
    (
        ali_ccp,
        AliCcp(),
        "common_features_test.csv",
        "81,6,",
        "81,",
        "Expected Number of Columns: 3",
    ),
    (
        criteo,
        Criteo(),
        "valid.csv",
        ",1382,",
        ",many,",
        "valid.csv: row 1: i5 is 'many'; expected a number, or nothing",
    ),
    (criteo, Criteo(), "test.csv", ",9727dd16", "", "Expected Number of Columns: 40 Found: 39"),
    (criteo, Criteo(), "train.csv", "\n0,1,1", "\n5,1,1", "row 1: label is '5'; expected 0 or 1"),
]


@pytest.mark.parametrize(
    ("make", "source", "file", "old", "new", "expected"),
    BAD,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_values_are_refused_with_their_row(
    tmp_path: Path,
    make: Callable[[Path], Path],
    source: Any,
    file: str,
    old: str,
    new: str,
    expected: str,
) -> None:
    path = make(tmp_path)
    edited(path / file, old, new)
    message = refused(source, path, tmp_path)
    assert expected in message
    assert Path(file).name in message


@pytest.mark.parametrize(
    ("make", "source", "file", "command"),
    [
        (kuairand, KuaiRand(), "data/video_features_basic_pure.csv", "kuairand-pure"),
        (kuaivideo, KuaiVideo(), "test.csv", "kuaivideo_x1"),
        (taobao_x1, TaobaoAd(), "test.csv", "taobao_ad_x1"),
        (taobao_raw, TaobaoAd(), "user_profile.csv", "taobao_ad"),
        (ali_ccp, AliCcp(), "common_features_test.csv", "ali_ccp"),
        (criteo, Criteo(), "valid.csv", "criteo_x4"),
    ],
)
def test_a_missing_file_is_named_with_what_to_do(
    tmp_path: Path, make: Callable[[Path], Path], source: Any, file: str, command: str
) -> None:
    path = make(tmp_path)
    (path / file).rename(tmp_path / "elsewhere.csv")
    message = refused(source, path, tmp_path)
    assert f"python scripts/download.py {command}" in message
    assert f"no {Path(file).name.replace('pure', '*')} in it; found " in message


def test_other_bad_paths(tmp_path: Path) -> None:
    path = kuaivideo(tmp_path)
    assert f"Type data.path={path}" in refused(KuaiVideo(), path / "train.csv", tmp_path)
    (path / "test.csv").write_text(KUAIVIDEO + "\n")
    assert "test.csv: no rows in it" in refused(KuaiVideo(), path, tmp_path)
    (path / "test.csv").write_text("")
    assert "test.csv: the file is empty" in refused(KuaiVideo(), path, tmp_path)
    message = refused(KuaiRand(labels=("clicks",)), path, tmp_path)
    assert "data.source.labels has 'clicks'" in message
    assert "did you mean 'click'" in message


# Through prepare, to the examples that a ranker learns from


def examples_of(source: Any, path: Path, tmp_path: Path, split: Mapping[str, Any]) -> Any:
    workspace = Workspace(tmp_path / "workspace")
    dataset = prepare({"name": "ctr", "path": str(path)}, source, split, workspace)
    return dataset, impressions(dataset)


LAST_OUT = {"rule": "leave_one_out"}


@pytest.mark.parametrize(
    ("make", "source", "parts"),
    [
        (kuaivideo, KuaiVideo(), (3, 0, 1)),
        (taobao_x1, TaobaoAd(), (2, 0, 1)),
        (taobao_raw, TaobaoAd(), (2, 0, 1)),
        (ali_ccp, AliCcp(validation_every=2), (1, 1, 2)),
    ],
)
def test_parts_are_the_publishers_after_prepare(
    tmp_path: Path, make: Callable[[Path], Path], source: Any, parts: tuple[int, int, int]
) -> None:
    _, examples = examples_of(source, make(tmp_path), tmp_path, LAST_OUT)
    train, validation, test = (examples.parts[name] for name in ("train", "validation", "test"))
    assert (train.start, train.stop, test.stop) == (0, parts[0], len(examples))
    assert test.stop - test.start == parts[2]
    # Where the publisher has none, the test part validates, as in BARS.
    assert validation == (slice(train.stop, test.start) if parts[1] else test)
    assert len(examples) == sum(parts)


def test_kuaivideo_after_prepare(tmp_path: Path) -> None:
    dataset, examples = examples_of(KuaiVideo(), kuaivideo(tmp_path), tmp_path, LAST_OUT)
    ids = ["", *dataset.items["item_id"].to_pylist()]
    assert [ids[item] for item in examples.items] == ["11", "12", "13", "14"]
    assert examples.places.tolist() == [0, 1, 1, 3]
    assert examples.labels.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert examples.context["neg_items"].to_pylist() == [[], [], ["12"], ["12"]]
    assert dataset.items["picture"].to_pylist()[ids.index("14") - 1] == [28.0, 29.0]


def test_kuairand_after_prepare(tmp_path: Path) -> None:
    source = KuaiRand(labels=("click", "dwell"))
    data = kuairand(tmp_path) / "data" / "log_standard_4_22_to_5_08_pure.csv"
    with data.open("a") as file:
        for place, clicked in enumerate("1101101011"):
            row = f"3,10,20220423,0,{1650700000000 + place},{clicked},0,0,0,0,0,0,5000,9,0,0,0,0,1"
            print(row, file=file)
    split = {"rule": "temporal", "validation_share": 0.1, "test_share": 0.1}
    dataset, examples = examples_of(source, data.parent, tmp_path, split)
    assert examples.tasks == ("click", "dwell")
    assert np.all(np.diff(examples.times) > 0)
    assert examples.places[0] == 0
    # Two before, and six clicks: not the click of the row itself, nor another user's.
    assert examples.places[-1] == 8
    assert dataset.manifest["item_features"]["tags"] == "multi"
    assert dataset.manifest["user_features"]["register_days"] == "numeric"


def test_criteo_after_prepare(tmp_path: Path) -> None:
    dataset, examples = examples_of(Criteo(), criteo(tmp_path), tmp_path, LAST_OUT)
    assert (dataset.num_users, dataset.num_items) == (0, 0)
    assert examples.parts["validation"] == slice(2, 3)
    assert examples.context["I5"].to_pylist() == ["52"] * 4
    assert examples.users.tolist() == [-1] * 4
    assert examples.items.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("name", "make", "source"),
    [
        ("kuairand", kuairand, KuaiRand()),
        ("kuaivideo", kuaivideo, KuaiVideo()),
        ("taobao_ad", taobao_x1, TaobaoAd()),
        ("taobao_ad_raw", taobao_raw, TaobaoAd()),
        ("ali_ccp", ali_ccp, AliCcp()),
        ("criteo", criteo, Criteo()),
    ],
)
def test_declared_columns_are_there(
    tmp_path: Path, name: str, make: Callable[[Path], Path], source: Any
) -> None:
    read = rows(source, make(tmp_path), tmp_path)
    found = {
        "item": {"item_id", *next(iter(read.items.values()), {})},
        "user": {"user_id", *next(iter(read.users.values()), {})},
        "request": set(read.impressions[0]) - set(read.labels),
    }
    for column in declare(yaml.safe_load((CONFIGS / "features" / f"{name}.yaml").read_text())):
        if column.kind not in ("hour", "weekday"):
            assert column.source in found.get(column.of, {column.source}), column.name


def test_download_unpacks_what_kuairand_comes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = script()
    folder = kuairand(tmp_path)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.add(folder, folder.name)
    answer = io.BytesIO(stream.getvalue())
    answer.headers = {}  # type: ignore[attr-defined]
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: answer)
    download.fetch("kuairand-pure", tmp_path / "downloads")
    unpacked = tmp_path / "downloads" / "kuairand-pure" / "KuaiRand-Pure"
    assert len(rows(KuaiRand(), unpacked, tmp_path).impressions) == 4


def test_download_refuses_archives_that_point_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = script()
    folder = tmp_path / "kuairand-pure"
    folder.mkdir()
    with tarfile.open(folder / "KuaiRand-Pure.tar.gz", "w:gz") as archive:
        archive.add(write(tmp_path / "evil.csv", "x"), "../../evil")
    with pytest.raises(SystemExit, match="points outside"):
        download.fetch("kuairand-pure", tmp_path)


def script() -> Any:
    file = CONFIGS.parent / "scripts" / "download.py"
    spec = importlib.util.spec_from_file_location("script_download_ctr", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_common_features_given_twice_are_refused(tmp_path: Path) -> None:
    path = ali_ccp(tmp_path)
    with (path / "common_features_test.csv").open("a") as file:
        print(f"bacff91692951881,1,{features(PERSON[0])}", file=file)
    message = refused(AliCcp(), path, tmp_path)
    assert "common_features_test.csv: row 2: common is 'bacff91692951881'; which an" in message


@pytest.mark.parametrize(
    ("make", "setting", "value"),
    [
        (KuaiVideo, "sequences", -1),
        (TaobaoAd, "sequences", 2.5),
        (TaobaoAd, "test_from", None),
        (AliCcp, "histories", "many"),
        (AliCcp, "validation_every", 1),
    ],
)
def test_wrong_settings_name_themselves(make: Any, setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"data.source.{setting}={value}"):
        make(**{setting: value})


OURS = ("kuairand", "kuaivideo", "taobao_ad", "ali_ccp", "criteo")


@pytest.mark.parametrize("name", OURS)
def test_configs_mirror_their_constructors(name: str) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    text = (CONFIGS / "data" / f"{name}.yaml").read_text()
    assert "data.path" in text.split("name:")[0]
    config = OmegaConf.create(text)
    source = instantiate(config.source)
    assert {key for key in config.source if key != "_target_"} == set(vars(source))
    assert PrepareSettings.of(config).name == name
