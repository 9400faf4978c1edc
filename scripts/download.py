"""Fetch public datasets, check their hash, unpack them; or say what to fetch by hand.

python scripts/download.py            # the list
python scripts/download.py ml-latest-small ml-1m --into downloads
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
AMAZON_2018 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"
AMAZON_2023 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw"
MOVIELENS_TERMS = "research use, no redistribution; Harper & Konstan 2015 (see its README)"
AMAZON_TERMS = "academic use; McAuley lab, UC San Diego"
KUAIRAND = "https://zenodo.org/records/10439422/files"
KUAIRAND_TERMS = "CC BY-SA 4.0; Gao et al., CIKM 2022"


@dataclass(frozen=True)
class Public:
    """A public dataset. md5: as its publisher states it, or none; page: where a person gets it.

    files: URLs to fetch, or, where the site asks for a login, nothing; then `expects` names the
    files that must lie in the folder in the end.
    """

    page: str
    terms: str
    command: str
    files: tuple[str, ...] = ()
    md5: str | None = None
    expects: tuple[str, ...] = ()


def _movielens(name: str, md5: str | None, expects: tuple[str, ...]) -> Public:
    return Public(
        page=f"https://grouplens.org/datasets/movielens/{name.removeprefix('ml-')}/",
        terms=MOVIELENS_TERMS,
        command=f"recsys prepare data=movielens data.path={{folder}}/{name}",
        files=(f"{GROUPLENS}/{name}.zip",),
        md5=md5,
        expects=tuple(f"{name}/{file}" for file in expects),
    )


def _kuairand(version: str) -> Public:
    name = f"KuaiRand-{version}"
    logs = ("standard_4_08_to_4_21", "standard_4_22_to_5_08", "random_4_22_to_5_08")
    files = (*(f"log_{log}" for log in logs), "user_features", "video_features_basic")
    return Public(
        page="https://kuairand.com",
        terms=KUAIRAND_TERMS,
        command=f"recsys train experiment=kuairand data.path={{folder}}/{name}",
        files=(f"{KUAIRAND}/{name}.tar.gz",),
        expects=tuple(f"{name}/data/{file}_{version.lower()}.csv" for file in files),
    )


def _reczoo(name: str, experiment: str, terms: str, expects: tuple[str, ...]) -> Public:
    return Public(
        page=f"https://huggingface.co/datasets/reczoo/{name}",
        terms=terms,
        command=f"recsys train experiment={experiment} data.path={{folder}}",
        files=(f"https://huggingface.co/datasets/reczoo/{name}/resolve/main/{name}.zip",),
        expects=expects,
    )


ARCHIVES = (".zip", ".tar.gz")
CSVS = ("ratings.csv", "movies.csv")
DATASETS = {
    # GroupLens changes latest-small from time to time, so it has no fixed hash.
    "ml-latest-small": _movielens("ml-latest-small", None, CSVS),
    "ml-100k": _movielens("ml-100k", "0e33842e24a9c977be4e0107933c0723", ("u.data", "u.item")),
    "ml-1m": _movielens("ml-1m", "c4d9eecfca2ab87c1945afe126590906", ("ratings.dat", "movies.dat")),
    "ml-20m": _movielens("ml-20m", "cd245b17a1ae2cc31bb14903e1204af3", CSVS),
    "ml-25m": _movielens("ml-25m", "6b51fb2759a8657d3bfcbfc42b592ada", CSVS),
    "ml-32m": _movielens("ml-32m", "d472be332d4daa821edc399621853b57", CSVS),
    "amazon-beauty-2018": Public(
        page="https://nijianmo.github.io/amazon/",
        terms=AMAZON_TERMS,
        command="recsys prepare data=amazon data.path={folder}/All_Beauty.json.gz "
        "data.source.metadata={folder}/meta_All_Beauty.json.gz",
        files=(
            f"{AMAZON_2018}/categoryFiles/All_Beauty.json.gz",
            f"{AMAZON_2018}/metaFiles2/meta_All_Beauty.json.gz",
        ),
    ),
    "amazon-beauty-2023": Public(
        page="https://amazon-reviews-2023.github.io/",
        terms=AMAZON_TERMS,
        command="recsys prepare data=amazon data.path={folder}/All_Beauty.jsonl.gz "
        "data.source.metadata={folder}/meta_All_Beauty.jsonl.gz",
        files=(
            f"{AMAZON_2023}/review_categories/All_Beauty.jsonl.gz",
            f"{AMAZON_2023}/meta_categories/meta_All_Beauty.jsonl.gz",
        ),
    ),
    "taobao": Public(
        page="https://tianchi.aliyun.com/dataset/649",
        terms="CC BY-NC-SA 4.0; needs a Tianchi account",
        command="recsys prepare data=taobao data.path={folder}/UserBehavior.csv",
        expects=("UserBehavior.csv",),
    ),
    "retailrocket": Public(
        page="https://www.kaggle.com/datasets/retailrocket/ecommerce-dataset",
        terms="CC BY-NC-SA 4.0; needs a Kaggle account",
        command="recsys prepare data=retailrocket data.path={folder}",
        expects=(
            "events.csv",
            "item_properties_part1.csv",
            "item_properties_part2.csv",
            "category_tree.csv",
        ),
    ),
    "otto": Public(
        page="https://www.kaggle.com/datasets/otto/recsys-dataset",
        terms="CC BY 4.0; needs a Kaggle account",
        command="recsys prepare data=otto data.path={folder}/otto-recsys-train.jsonl",
        expects=("otto-recsys-train.jsonl",),
    ),
    "kuairand-pure": _kuairand("Pure"),
    "kuairand-1k": _kuairand("1K"),
    "kuaivideo_x1": _reczoo(
        "KuaiVideo_x1",
        "kuaivideo_x1",
        "research use, see the page; Kuaishou, prepared by BARS",
        ("train.csv", "test.csv", "item_visual_emb_dim64.h5"),
    ),
    "taobao_ad_x1": _reczoo(
        "TaobaoAd_x1",
        "taobao_ad_x1",
        "research use, see the page; Alibaba, prepared by BARS",
        ("train.csv", "test.csv"),
    ),
    "criteo_x4": _reczoo(
        "Criteo_x4",
        "criteo_x4",
        "research use, see the page; Criteo, split by BARS",
        ("train.csv", "valid.csv", "test.csv"),
    ),
    "taobao_ad": Public(
        page="https://tianchi.aliyun.com/dataset/56",
        terms="research use, see the page; needs a Tianchi account",
        command="recsys prepare data=taobao_ad data.path={folder}",
        expects=("raw_sample.csv", "ad_feature.csv", "user_profile.csv", "behavior_log.csv"),
    ),
    "ali_ccp": Public(
        page="https://tianchi.aliyun.com/dataset/408",
        terms="research use, see the page; needs a Tianchi account",
        command="recsys train experiment=ali_ccp data.path={folder}",
        expects=(
            "sample_skeleton_train.csv",
            "sample_skeleton_test.csv",
            "common_features_train.csv",
            "common_features_test.csv",
        ),
    ),
}


def fetch(name: str, into: Path) -> None:
    """Bring one dataset into `into`; exit with what to do by hand where that is not possible."""
    public = DATASETS[name]
    folder = into if name.startswith("ml-") else into / name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = public.expects or tuple(url.rsplit("/", 1)[1] for url in public.files)
    print(f"{name}: {public.terms}")
    if not all((folder / file).is_file() for file in wanted):
        if not public.files:
            raise SystemExit(by_hand(name, folder, wanted, "it needs a login"))
        for url in public.files:
            file = folder / url.rsplit("/", 1)[1]
            _bring(name, url, file, public.md5, wanted)
            _unpack(file, folder)
    print(f"{name}: in {folder}\nnext: {public.command.format(folder=folder)}")


def by_hand(name: str, folder: Path, wanted: tuple[str, ...], reason: str) -> str:
    """Return what a person should fetch and where to put it."""
    public = DATASETS[name]
    urls = "".join(f"\n  {url}" for url in public.files)
    md5 = f" (MD5 {public.md5})" if public.md5 else ""
    packed = next((end for end in ARCHIVES for url in public.files if url.endswith(end)), None)
    put = (
        f"put the {packed}{md5} in {folder} as it is and run this again"
        if packed
        else (f"put {', '.join(wanted)} in {folder}")
    )
    return (
        f"{name}: not fetched: {reason}.\nOn a machine with a network, open {public.page}"
        f"{f' or fetch{urls}' if urls else ''}\nthen {put}.\n"
        f"After that: {public.command.format(folder=folder)}"
    )


def _bring(name: str, url: str, file: Path, md5: str | None, wanted: tuple[str, ...]) -> None:
    """Download `url` whole or not at all, unless the file is there, and check its MD5."""
    if not file.is_file():
        part = file.with_suffix(f"{file.suffix}.part")
        try:
            with urllib.request.urlopen(url, timeout=30) as answer, part.open("wb") as stream:
                _copy(answer, stream, file.name)
            part.replace(file)
        except (urllib.error.URLError, OSError) as error:
            part.unlink(missing_ok=True)
            raise SystemExit(by_hand(name, file.parent, wanted, str(error))) from None
    found = _digest(file, "md5")
    if md5 and found != md5:
        raise SystemExit(
            f"{file}: MD5 is {found}, its publisher says {md5}; delete the file and run this again"
        )
    checked = "MD5 as published" if md5 else f"no published hash; SHA-256 {_digest(file, 'sha256')}"
    print(f"{file.name}: {file.stat().st_size / 1e6:,.1f} MB, {checked}")


def _copy(answer: object, stream: object, name: str) -> None:
    total = int(answer.headers.get("Content-Length") or 0)
    done = 0
    while block := answer.read(1 << 20):
        stream.write(block)
        done += len(block)
        share = f" of {total / 1e6:,.0f}" if total else ""
        print(f"\r{name}: {done / 1e6:,.0f}{share} MB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _digest(file: Path, kind: str) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def _unpack(file: Path, folder: Path) -> None:
    if file.name.endswith(".tar.gz"):
        try:
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter="data")
        except tarfile.FilterError as error:
            raise SystemExit(f"{file}: {error}; an entry points outside {folder}") from None
    if file.suffix != ".zip":
        return
    root = folder.resolve()
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            target = (folder / member.filename).resolve()
            if not target.is_relative_to(root):
                raise SystemExit(f"{file}: entry {member.filename!r} points outside {folder}")
            if not member.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("--into", type=Path, default=Path("downloads"))
    chosen = parser.parse_args()
    for name in chosen.names:
        if name not in DATASETS:
            parser.error(f"no dataset {name!r}; there are {', '.join(DATASETS)}")
    for name in chosen.names:
        fetch(name, chosen.into)
    if not chosen.names:
        for name, public in DATASETS.items():
            print(f"{name:20} {public.terms:70} {public.page}")


if __name__ == "__main__":
    main()
