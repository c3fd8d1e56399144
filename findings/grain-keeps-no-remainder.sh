#!/usr/bin/env bash
# grain 0.2.18, numpy 2.4.6: in one epoch, drop_remainder=False drops records too.
# Behavior: 10 records for 3 processes, IndexSampler with ShardOptions(drop_remainder=False), num_epochs=1: each process
# reads 3. The first one's part is records 0 to 3, of which it never reads one: record 3 without shuffling, another
# with it. The sampler stops after 10 // 3 records in each process, though the parts are cut as 4, 3 and 3. With
# num_epochs=3 each process reads 10: the first goes through its 4 records 2.5 times, the others through their 3, 3.3.
# One would have guessed: 4, 3 and 3, as the option's documentation says ("distribute the remainder N over the first N
# shards"), and as MapDataset[rank::3] gives.
# Why it matters: an evaluation over one epoch leaves out up to (processes - 1) records. drop_remainder=True logs that
# it drops some; False, which is the default, says nothing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile grain==0.2.18 numpy==2.4.6
venv/bin/python - <<'PY'
import grain.python as grain

RECORDS, PROCESSES = 10, 3


class Numbers:
    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        return index

    def __repr__(self):
        return "Numbers"


def read(rank, epochs, shuffle):
    part = grain.ShardOptions(rank, PROCESSES, drop_remainder=False)
    sampler = grain.IndexSampler(RECORDS, part, shuffle=shuffle, num_epochs=epochs, seed=1)
    return list(grain.DataLoader(data_source=Numbers(), sampler=sampler, worker_count=0))


missing = {}
for epochs, shuffle in ((1, False), (1, True), (3, False)):
    parts = [read(rank, epochs, shuffle) for rank in range(PROCESSES)]
    missing[epochs, shuffle] = set(range(RECORDS)).difference(*parts)
    print(f"epochs {epochs}, shuffle {shuffle}: {parts}, never read: {missing[epochs, shuffle] or 'none'}")
sliced = [list(grain.MapDataset.source(Numbers())[rank::PROCESSES]) for rank in range(PROCESSES)]
print("MapDataset:", sliced)
alone = missing[1, False] == {3} and len(missing[1, True]) == 1 and not missing[3, False]
if not alone or sum(sliced, []).count(3) != 1 or len(sum(sliced, [])) != RECORDS:
    raise SystemExit("changed: what one epoch leaves out")
PY
