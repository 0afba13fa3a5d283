"""One path is one place for all ranks, and where it is not they hear so before anything is written."""

import pytest

import ranks
from multirank import place_cases

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("how", ("raise", "warn"))
@pytest.mark.parametrize(("world", "apart"), ((2, [1]), (3, [0]), (3, [1, 2])))
def test_ranks_that_write_to_disks_of_their_own_are_named(tmp_path, world, apart, how):
    """A path that each node has for itself is an error of the first save, naming who sees what; nothing is left."""
    blind = "rank 1 cannot" if world == 2 else "ranks 1, 2 cannot"
    for found in ranks.world(world).run(place_cases.own_disks, str(tmp_path), apart, how):
        assert found["kind"] == ("StorageError" if how == "raise" else "SaveFailedError")
        assert str(tmp_path) in found["told"]
        assert "rank 0 can" in found["told"]
        assert blind in found["told"]
        assert "mounted at the same path" in found["told"]
        assert found["left"] == []
        assert found["value"] == 2.0


@pytest.mark.parametrize("looks", (1, 3))
def test_a_file_system_that_shows_things_late_is_waited_for(tmp_path, looks):
    """On a network file system one machine sees what another has made only after a while."""
    assert ranks.world(2).run(place_cases.late, str(tmp_path), looks) == [3.0, 3.0]


def test_only_the_first_save_below_a_directory_looks(tmp_path):
    """In steady state it costs nothing; a new parent directory may be another mount."""
    first, second = ranks.world(2).run(place_cases.looks_of_saves, str(tmp_path))
    assert first == [0, 0, 0, 0]
    assert second == [1, 0, 0, 1]
