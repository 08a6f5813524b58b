"""The same seed gives the same bytes on every machine: digests of samples, taken once and written down here.

A digest changes when a template, a draw, wonderwords' lists or punkt's parameters change. Then results made before and
after are of different data: bump what the record says of it, and the digest.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tasks import load_tasks
from tasks.base import TaskOptions
from tests.task_data import RULER, Options, digest, draw_samples

SMALL = {
    "niah/snapkv": "e9a97a1a63aed9e09a3aefa3045aabfe2821dd2303492cbd3872f654820c53fb",
    "niah/kamradt": "891ac173b39c398c6ce45e019132cbb2b78d3ce6e224dd9d070d45c69f88d9f0",
    "niah/passkey": "df98c528493e57759693b36b79944038deb9efbafc0a66bc97d6ae87d3cf2b2a",
    "ruler/niah_single_1": "894d84750996df65ec28c45116c26e14d6efeeff1a194fd1b746e08d56d8084b",
    "ruler/niah_single_2": "3d2407064202fa893466a3e1063f8f68d58fc26f63b947b8bd6d79ff8ceb20ec",
    "ruler/niah_single_3": "f4a6ccdbebf62a28223ce092cd5b2165e43a674df5ffd02a1546a5b9fb8386a4",
    "ruler/niah_multikey_1": "3269bb54d54b807b23a65d3423220f387207211797a737df29020ff75c1a72db",
    "ruler/niah_multikey_2": "a9b900600e96d9a9d187aac6fbad18bc266ca8522685d8b58d014486ee136a24",
    "ruler/niah_multikey_3": "c65ad2008ba93148ef64a2728cb24a5ee05bf5d1842196e1735f3dd222b291eb",
    "ruler/niah_multivalue": "ff955102466beae02cdfeb74701afd8fb833eb339bb4bdb0633e094da146005f",
    "ruler/niah_multiquery": "f806c9d7393043fb7d46f112e3873452d5d10d9497cc08fd7d846e5b3f1814b6",
    "ruler/vt": "f28eea5aa61951561576bf9a998b49fcb502a854c899de423c03c2dff5f953e2",
    "ruler/cwe": "f2f12f2beb59c3ada5558835bf049e20cb6c50805f28b5558630f80e0b6bfe78",
    "ruler/fwe": "33fb753c1b06643e4d7d000ff7de879b17c53e188d30079f89effc29f68a0eea",
    "ruler/qa_1": "c7239acec4dac0a4bed3f619f0d24b4918790bfa290e28975cbc76bdb828c94b",
    "ruler/qa_2": "c3a0db43e4f48a9b5aa8fb68675f7f1d0e366c653b93ecf0a142bdf4190f05ff",
}
PROSE = {
    "prose/continuation": "c29938fb95b7fef950b9e32fc768e2c4ac12053c1fbcba78210823763f5cbc15",
    "prose/long": "5716c10192ca89d4e6b59098250786ce8975705376d9f2357f289738046e5ced",
}
DRAWN = {
    "instructions/obey": "09cad00904b30d8f325512006d23c2b9a179d68618af435f0cecc200029e0842",
    "instructions/secret": "52229648d7a10b5bb5bee94b1ac2bee49c0cbb57ec0582dc53fbaeaf4bc08025",
    "graded/retrieval_number": "181795fb4f0020dc0e44e7d72d492b2df8dd9ef36bb8d8edd24ed33aeee69383",
    "graded/retrieval_owner": "34b3ebfa7700b0785e9d25dbf8ae144395c35e47638941958960299249f33f14",
    "graded/retrieval_digits": "212fa1da827abec95914db6fed5f5268f56fab975cbeaed2a476fe8643916842",
    "graded/retrieval_label": "93f3b958e209ce28c37ad8ab22d6a5de9fe2d0effb3a18f8068f831aea54f1dd",
    "graded/keys_all": "403767058f6a277894b045aac0a4ab5cd97849220b0185ddb3a02aaa7b5618c4",
    "graded/keys_owned": "2496ef818080c27f1e10f78c5748b139ca25b1e6cdef8a454456ccd8c5b46f61",
    "graded/tracking_moves": "1eca13628a5558e841439b3de2ca5cd5b5461bf80c7591d81660dec868ecacea",
    "graded/tracking_hands": "4aeb99a7b89c733e6f3e94ee72119a0c7dca039f4d7e72c1b495c84ca86629e9",
    "graded/tracking_same": "5aeae29e6b6bdb503be7d654dad9a30f5d328034cc89c0d9b9f284e31068af26",
    "graded/ordering_first": "e0e72088646eeaf4d7d97559fa7c737de1b6722aea2fc6d0d46526e6a74033f9",
    "graded/ordering_last": "f90122b792defebaf8cd0db37274bd9a43682874b5c47dc402368002cf0d3f08",
    "graded/ordering_next": "2bc40b8d6fc293a430931e512a30ba9bd04f0872abee320b3f9d7099e46903f1",
    "graded/ordering_list": "860bca0492f32ab75d23df498ba6d630a0bb2122e009442d8bbf0a7c35294c72",
    "graded/aggregation_most": "f2b0ad0d8565fc30ebf9627d5fcf10075202b295e0f5d47ec4dba4c24dc68c1c",
    "graded/aggregation_voters": "a1579a2342f228829547745821f4616b3f44c669124947df3a962464c7ed6a0e",
    "graded/aggregation_kinds": "62c6af656a7474f29c2bb3a977aa1efa6ad7374dcf7cdc1aca13f2130b879717",
    "graded/copying_words": "54a6cbe3dec24d212b9a07911d2a4660cdc79619ad1661438fafaf1587a4f5bc",
    "graded/copying_letters": "23be398193bfe7f6eb7a07af357e15f407e879bed911166ba30e2331524ec6b4",
    "turns/facts": "5ea2bc1d2b6750f31d23da116301adcb097a93ba87d13bb752acd6d40baad055",
    "turns/told": "06e764f4287282e489d9cb83881b60cfeb5d2af121bae7b2137a17d3747e4c70",
    "long/table": "d49c7498aa4c2e0f2e32831ec5f81a7ea6d393e476b6a92733b4eea6c843d06e",
    "long/list": "bf7b8659a56677d6bbb5ebae9452835b19fc5fdc22ec700dc9977a8297b54169",
    "long/sums": "5ecbe39153fbd46b601b1827992654d27bf789cb2f309f9d2a94a98be50e5284",
    "long/state": "fc561ac7db4f90d5acf1cec7de389406a9155956636fa8c7bdf8ca191b2082aa",
}
REAL = {
    "niah/snapkv": "1469db3482211ef4aa39d94b5ba7d62cc66318676bb2db8c1a2aa43aa6343d1e",
    "niah/kamradt": "63aea5b11fe61d5983113328d98a65b67bea188a1f0016145921670f699cc493",
    "niah/passkey": "4e43dabf597dccabbab4573d4278372525141d05abcf814697158c6c45122bf4",
    "ruler/niah_single_2": "32a2730841de5c0592b2a7931a93058bdedb33d85b5e05c49a00bc2c9b1f60ba",
    "ruler/niah_single_3": "8f1a18e286a652c8fd0c3fc1daa8b83d1a5b121b37bd53d42ec18e9c6ea981d4",
    "ruler/niah_multikey_1": "4d1f03593f5247678e1a9778ae8e9150c88dc80a349b32c4c256a43d56b35b18",
    "ruler/niah_multivalue": "f1a75400a73a4c1f9a618c6844afc05983dd535a6aa24066ef96d8260a62fe3d",
    "ruler/niah_multiquery": "8d39c4484cbadc9c5fb450f102cc4919590e5cdee802a6da3903a5d0af82fd7d",
    "prose/continuation": "77b1ee870e4ce0964fe1289e5fdcad0a9427c66e253cf24b114e4d8f87a492dd",
    "prose/long": "5d08604b4e58a060fae2256babe600293308746f77c78c195c83dab8a9874941",
}


def test_every_generated_task_has_a_digest() -> None:
    made = {name for name in load_tasks() if name.startswith(("ruler/", "niah/", "prose/"))}
    assert SMALL.keys() | PROSE.keys() == made
    again = "turns/again/"  # the samples of `turns`
    own = {name for name in load_tasks() if name.startswith(("graded/", "instructions/", "turns/", "long/"))}
    own = {name for name in own if not name.startswith(again)}
    assert DRAWN.keys() == own
    assert (len(SMALL), len(PROSE)) == (len(RULER) + 3, 2)


@pytest.mark.parametrize("name", SMALL | PROSE)
def test_samples_over_made_essays(name: str, options: Options, longer: Options) -> None:
    chosen = longer if name in PROSE else options
    samples = draw_samples(name, chosen(lengths=(1024, 4096), limit=3))
    assert len(samples) == 6
    assert digest(samples, without="" if name in PROSE else "group") == (SMALL | PROSE)[name]


@pytest.mark.parametrize("name", DRAWN)
def test_samples_over_a_made_pool(name: str, drawn: TaskOptions) -> None:
    samples = draw_samples(name, replace(drawn, lengths=(1024,), limit=3))
    assert (len(samples), digest(samples)) == (3, DRAWN[name])


@pytest.mark.parametrize("name", REAL)
def test_samples_over_the_real_essays(name: str, options: Options, essays_folder: Path) -> None:
    samples = draw_samples(name, options(fetch=lambda _: essays_folder, lengths=(4096,), limit=3))
    assert digest(samples, without="" if name in PROSE else "group") == REAL[name]
