"""A container's CPU quota is found, as both versions of control groups give it."""

import pytest

from imagefeed.codec.cores import quotas

CASES = {
    "0::/a/b": ({"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000", "cpu.max": "400000 100000"}, [1.5, 4]),
    "0::/": ({"cpu.max": "50000 100000"}, [0.5]),  # as in a container
    "0::/host/path": ({"cpu.max": "50000 100000"}, [0.5]),
    "0::/x": ({"x/cpu.max": "max 100000"}, []),
    "0::/none": ({}, []),
    "4:memory:/a\n3:cpu,cpuacct:/a": (
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        [2.5],
    ),
    "3:cpuacct,cpu:/docker/1": ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, [0.5]),
    "3:cpu:/": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
    "5:cpuset:/a": ({"cpuset/a/cpu.cfs_quota_us": "1", "cpuset/a/cpu.cfs_period_us": "1"}, []),
}


@pytest.mark.parametrize("groups", CASES)
def test_the_quotas_of_a_process_are_those_of_its_groups_and_of_those_around_them(tmp_path, groups):
    files, found = CASES[groups]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    (tmp_path / "of the process").write_text(f"{groups}\n")
    assert [quota for _, quota in quotas(tmp_path, tmp_path / "of the process")] == found
