"""Files of ids that others wrote are read in the width that they were written in."""

import itertools

import numpy as np
import pytest

from gpt2_flax.data.token_files import id_files, open_bin
from gpt2_flax.errors import UserError
from tests.text_fixtures import Numbers

IDS = [7, 999, 0, 3] * 9


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        *itertools.product(["<u2", "<u4", "<i4", "<u8", "<i8"], [1, 999]),
        *itertools.product(["<u4", "<i4", "<u8", "<i8"], [2**17]),
    ],
)
def test_the_width_is_seen_in_the_ids(tmp_path, dtype, largest):
    values = np.arange(5000) * 37 % (largest + 1)
    values.astype(dtype).tofile(tmp_path / "a.bin")
    ids, about = id_files([tmp_path / "a.bin"], Numbers(vocab_size=2**18), tmp_path / "cache")
    np.testing.assert_array_equal(ids.read(0, len(ids)), values)
    assert about["count"] == 5000


@pytest.mark.parametrize("values", [[0] * 5000, [3, 0] * 7, [1]], ids=["zeros", "few", "one"])
def test_where_nothing_tells_the_width_ids_are_uint16(tmp_path, values):
    np.asarray(values, "<u2").tofile(tmp_path / "a.bin")
    assert open_bin(tmp_path / "a.bin") == (tmp_path / "a.bin", np.dtype("<u2"), 0, len(values))


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")]
)
def test_both_headers_of_llm_c_are_known(tmp_path, magic, version, dtype):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(IDS)
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.asarray(IDS, dtype).tobytes())
    ids, _ = id_files([tmp_path / "a.bin"], Numbers(), tmp_path / "cache")
    assert ids.read(0, len(ids)).tolist() == IDS
    header[1] = 3
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.asarray(IDS, dtype).tobytes())
    with pytest.raises(
        UserError, match=f"llm.c's format {magic} in version 3, which is not known"
    ):
        open_bin(tmp_path / "a.bin")


def test_an_id_beyond_the_vocabulary_is_told_with_its_byte(tmp_path):
    np.asarray([5] * 99 + [1000], "<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"the id 1000 \(at id 99 of the file, byte 396\)"):
        id_files([tmp_path / "a.bin"], Numbers(), tmp_path / "cache")
