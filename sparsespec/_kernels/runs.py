"""Connected regions of label maps, from runs: stretches of one label in a row of pixels."""

from __future__ import annotations

from sparsespec._kernels._compile import device, kernel


@kernel()
def find_runs(labels, begin, end, first_run, starts, values):
    # (h, w) int, int64 (h + 1,), int32 (runs,), int (runs,) -> first_run, or starts and values, in place
    """Where the runs of rows `begin` to `end` begin and what they hold; with no room in `starts`, how many there are.

    `first_run[y]` is the number of runs in the rows before y; when counting, that of the runs in row y - 1.
    """
    width = labels.shape[1]
    for y in range(begin, end):
        row = labels[y]
        if starts.size == 0:
            count = 1
            for x in range(1, width):
                count += row[x] != row[x - 1]
            first_run[y + 1] = count
        else:
            run = first_run[y]
            starts[run] = 0
            values[run] = row[0]
            for x in range(1, width):
                if row[x] != row[x - 1]:
                    run += 1
                    starts[run] = x
                    values[run] = row[x]


@device()
def _root(parent, run):
    while parent[run] != run:
        parent[run] = parent[parent[run]]
        run = parent[run]
    return run


@kernel()
def join_runs(first_run, starts, values, width, region):
    # int64 (h + 1,), int32 (runs,), int (runs,) -> int32 (runs,)
    """Number the 4-connected regions of one label by their first pixels; return how many."""
    runs = starts.size
    parent = region
    for run in range(runs):
        parent[run] = run
    for y in range(1, first_run.size - 1):
        upper, lower = first_run[y - 1], first_run[y]
        while upper < first_run[y] and lower < first_run[y + 1]:
            if values[upper] == values[lower]:
                # The smaller root is the run whose first pixel comes first.
                one, other = _root(parent, upper), _root(parent, lower)
                if one < other:
                    parent[other] = one
                else:
                    parent[one] = other
            upper_end = starts[upper + 1] if upper + 1 < first_run[y] else width
            lower_end = starts[lower + 1] if lower + 1 < first_run[y + 1] else width
            if upper_end <= lower_end:
                upper += 1
            if lower_end <= upper_end:
                lower += 1
    count = 0
    for run in range(runs):
        # Parents come before their children, so that theirs are region numbers already.
        if parent[run] == run:
            region[run] = count
            count += 1
        else:
            region[run] = region[parent[run]]
    return count


@kernel()
def add_sizes(first_run, starts, width, region, sizes):
    # ..., int32 (runs,) -> int64 (regions,), zeros before
    """Count the pixels of the regions."""
    for y in range(first_run.size - 1):
        for run in range(first_run[y], first_run[y + 1]):
            end = starts[run + 1] if run + 1 < first_run[y + 1] else width
            sizes[region[run]] += end - starts[run]


@kernel()
def outlines(first_run, starts, width, region, small, inner, outer, length):
    # ..., bool (regions,) -> int32 (n,) three times
    """List the stretches of outline that small regions share with others, if n isn't 0; return how many there are."""
    count = 0
    for y in range(first_run.size - 1):
        begin, stop = first_run[y], first_run[y + 1]
        for run in range(begin + 1, stop):
            one, other = region[run - 1], region[run]
            if small[one] != small[other]:
                if inner.size:
                    inner[count] = one if small[one] else other
                    outer[count] = other if small[one] else one
                    length[count] = 1
                count += 1
        if y == 0:
            continue
        upper, lower = first_run[y - 1], begin
        while upper < begin and lower < stop:
            one, other = region[upper], region[lower]
            upper_end = starts[upper + 1] if upper + 1 < begin else width
            lower_end = starts[lower + 1] if lower + 1 < stop else width
            if small[one] != small[other]:
                if inner.size:
                    inner[count] = one if small[one] else other
                    outer[count] = other if small[one] else one
                    length[count] = min(upper_end, lower_end) - max(starts[upper], starts[lower])
                count += 1
            if upper_end <= lower_end:
                upper += 1
            if lower_end <= upper_end:
                lower += 1
    return count


@kernel()
def write_regions(first_run, starts, region, changed, value, begin, end, labels):
    # ..., bool (regions,), int32 (regions,), rows -> (h, w) labels in place
    """Give every pixel of the changed regions in rows `begin` to `end` a new label; the others aren't touched."""
    width = labels.shape[1]
    for y in range(begin, end):
        for run in range(first_run[y], first_run[y + 1]):
            if changed[region[run]]:
                stop = starts[run + 1] if run + 1 < first_run[y + 1] else width
                labels[y, starts[run] : stop] = value[region[run]]


@kernel()
def replace_labels(labels, begin, end, number):
    # (h, w) int in place, int64 (n,)
    """Write `number[label]` in rows `begin` to `end` for every label that `number` has and that it changes."""
    width = labels.shape[1]
    for y in range(begin, end):
        row = labels[y]
        x = 0
        while x < width:
            value = row[x]
            end = x + 1
            while end < width and row[end] == value:
                end += 1
            if 0 <= value < number.size and number[value] != value:
                row[x:end] = number[value]
            x = end


@kernel()
def measure_labels(labels, begin, end, out):
    # (h, w) int -> int64 (n, 5)
    """Pixels, first and last row, first and last column of each label below n, in rows `begin` to `end`.

    A label that isn't there keeps 0 pixels, and the rest of its entry is not to be read.
    """
    width, n = labels.shape[1], out.shape[0]
    for y in range(begin, end):
        row = labels[y]
        x = 0
        while x < width:
            value = row[x]
            end = x + 1
            while end < width and row[end] == value:
                end += 1
            if 0 <= value < n:
                entry = out[value]
                if entry[0] == 0:
                    entry[1] = y
                    entry[3] = x
                    entry[4] = end - 1
                entry[0] += end - x
                entry[2] = y
                entry[3] = min(entry[3], x)
                entry[4] = max(entry[4], end - 1)
            x = end
