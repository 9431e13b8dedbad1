"""Turns a CSV of sweep.sh into the tables of README.md in this folder and into figures beside the CSV.

    python results/report.py results/sweep.csv            # write them
    python results/report.py results/sweep.csv --check    # only fail if they are not what the CSV gives

A block of README.md from <!-- report:sweep NAME --> to <!-- /report --> holds the table NAME of sweep.csv,
one of summary, runs, pe_type, n_embd, n_head, n_layer, seeds, published. If README.md has no block of a CSV,
its tables are printed. The CSV may hold any part of the sweep, with one seed a run or several, but only one
setting of all other flags. seed.csv holds the losses that were published for the experiment.
"""
import argparse, csv, hashlib, math, re, shlex, statistics, sys
from collections import Counter, defaultdict
from functools import partial
from itertools import combinations, cycle, product
from pathlib import Path
from typing import NamedTuple
try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError:
    sys.exit("report.py: error: matplotlib is missing; pip install -r requirements.txt brings it")

README = Path(__file__).with_name("README.md")
PUBLISHED = Path(__file__).with_name("seed.csv")
LOSSES = {"val_loss": "val loss", "train_loss": "train loss"}
GRIDS = [((384, 768), (6, 8, 12)), ((96, 192), (3, 4, 6))]  # widths and depths of sweep.sh, and with --tiny
PES = {"None": ("black", "learned vectors (gpt, gpt_v2)"),
       "randn": ("#e69f00", "fixed random vectors (randn)"),
       "sinpe": ("#0072b2", "sines and cosines (sinpe)"),
       "rope": ("#009e73", "rotations (rope)")}

class Run(NamedTuple):
    """What tells the runs of a sweep apart."""
    experiment: str
    pe_type: str
    n_embd: int
    n_head: int
    n_layer: int

FACTORS = Run._fields[1:]  # each has its table

def fail(message, status=2):
    """End the program with one line on standard error; status 1 says that --check found a difference."""
    print(f"report.py: error: {message}", file=sys.stderr)
    sys.exit(status)

# --- Reading ---------------------------------------------------------------------------------------------
def read(path):
    """A CSV of the scripts -> {Run: [row of each seed]}, every row a dict of its cells and its setting."""
    needed = [*Run._fields, *LOSSES, "train_s", "device", "torch", "data_crc32", "flags"]
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(file)
        header, *table = list(csv.reader(lines)) or [needed]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path}: {error}")
    if not set(needed) <= set(header):
        fail(f"{path}: it is not a CSV of the sweep")
    runs, seen = defaultdict(list), set()
    for number, cells in enumerate(table, 2):
        try:
            row = dict(zip(header, cells, strict=True))
            run = Run(row["experiment"], row["pe_type"], *(int(row[name]) for name in FACTORS[1:]))
            [float(row[name]) for name in header if ("loss" in name or name == "train_s") and row[name]]
            words = shlex.split(row["flags"])
            flags = dict(zip(words[::2], words[1::2], strict=True))
            if run.pe_type not in PES or number > len(table) and not lines[-1].endswith("\n"):
                raise ValueError
        except ValueError:
            fail(f"{path}: line {number} is damaged or cut off")
        same = row["experiment"], row["flags"], row["data_crc32"]
        if same not in seen:  # a sweep that was killed may have appended a row twice
            for name in ("--n_embd", "--n_head", "--n_layer", "--pe", "--seed"):
                flags.pop(name, None)
            runs[run].append(row | {"setting": flags | {"data_crc32": row["data_crc32"]}})
        seen.add(same)
    rows = sum(runs.values(), [])
    for name in sorted({name for row in rows for name in row["setting"]}):
        scripts = {row["experiment"] for row in rows if name in row["setting"]}  # that have such a flag
        values = {row["setting"].get(name, "none") for row in rows if row["experiment"] in scripts}
        if len(values) > 1:
            fail(f"{path}: rows differ in {name} ({', '.join(sorted(values))}); a report is of one setting")
    return dict(runs)

class Loss(NamedTuple):
    """A loss over the seeds of a run: '1.5061', or with several of them '1.5061 ± 0.0020'."""
    mean: float
    spread: float  # the standard deviation
    seeds: int

    def __str__(self):
        return f"{self.mean:.4f}" + f" ± {self.spread:.4f}" * (self.seeds > 1)

def loss(rows, name):
    """The Loss in a column of a run's rows, '' where nothing was measured."""
    values = [float(row[name]) for row in rows if row.get(name)]
    if not values:
        return ""
    return Loss(statistics.mean(values), statistics.stdev(values) if values[1:] else 0.0, len(values))

def found(runs):
    """How many of the 56 runs of sweep.sh, or of sweep.sh --tiny, have a row."""
    counts = []
    for widths, depths in GRIDS:
        grid = [Run(script, "None", widths[0], 6, depths[0]) for script in ("gpt", "gpt_v2")]
        grid += [Run("gpt_v3", *run) for run in product(list(PES)[1:], widths, (6, 8, 12), depths)]
        counts.append(len(runs.keys() & set(grid)))
    return max(counts)

def matched(runs, factor, name):
    """gpt_v3's losses by all but a factor -> its levels, {rest: {level: Loss}}, those with every level."""
    table = defaultdict(dict)
    for run, rows in runs.items():
        if run.experiment == "gpt_v3" and loss(rows, name):
            rest = tuple(getattr(run, other) for other in FACTORS if other != factor)
            table[rest][getattr(run, factor)] = loss(rows, name)
    levels = sorted({level for row in table.values() for level in row},
                    key=list(PES).index if factor == "pe_type" else None)
    return levels, table, {rest: row for rest, row in table.items() if len(row) == len(levels) > 1}

def spearman(pairs):
    """Rank correlation of (x, y) pairs, ties at their mean rank; None where there is none."""
    ranks = [[sum(other < value for other in column) + column.count(value) / 2 for value in column]
             for column in zip(*pairs)]
    try:
        return statistics.correlation(*ranks)
    except statistics.StatisticsError:  # a single pair, or equal ranks
        return None

# --- Tables ----------------------------------------------------------------------------------------------
def markdown(header, rows):
    """A Markdown table, numbers to the right."""
    columns = ["".join(map(str, cells)) for _, *cells in zip(header, *rows)]
    align = ["---:" if re.match(r"[-+*\d]", column) else "---" for column in columns]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, align, *rows))

def folded(summary, table):
    return f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>"

def summary_table(runs):
    """How much of the sweep there is, and how it was run."""
    rows = sum(runs.values(), [])
    if not rows:
        return "0 of 56 runs."
    seeds = [f"{count} with {n} seed{'s' * (n > 1)}"
             for n, count in sorted(Counter(map(len, runs.values())).items())]
    setting = max((row["setting"] for row in rows), key=len)
    flags = " ".join(f"{name} {value}" for name, value in setting.items() if name != "data_crc32")
    where = [", ".join(sorted({row[name] or "unknown" for row in rows})) for name in ("device", "torch")]
    hours = sum(float(row["train_s"] or 0) for row in rows) / 3600
    return (f"{found(runs)} of 56 runs; {', '.join(seeds)}. Flags: `{flags}`. Device: {where[0]}; "
            f"torch: {where[1]}; {hours:.2f} hours of training in all.")

def runs_table(runs):
    """Every run with all its losses, lowest val loss first; "dropout on": in attention, in evaluation too."""
    columns = {"train_loss": "train loss", "val_loss": "val loss", "best_val_loss": "best val loss",
               "published_train_loss": "train, dropout on", "published_val_loss": "val, dropout on"}
    table = sorted(([*run, *(loss(rows, name) for name in columns)] for run, rows in runs.items()),
                   key=lambda line: line[6] or (math.inf,))
    return folded(f"All {len(runs)} runs, by val loss", markdown([*Run._fields, *columns.values()], table))

def factor_tables(runs, factor):
    """gpt_v3's losses with a column for each level of a factor, the configurations that do best first."""
    parts = []
    for name, title in LOSSES.items():
        levels, table, complete = matched(runs, factor, name)
        if not table:
            return "No run of gpt_v3 yet."
        wins = Counter(min(row, key=row.get) for row in complete.values())
        counts = [f"{level} lowest in {wins[level]}, mean "
                  f"{statistics.mean(row[level].mean for row in complete.values()):.4f}"
                  for level in levels if complete]
        summary = (f"<b>{title} by {factor}</b>, {len(complete) or 'no'} complete configurations"
                   + ": " * bool(counts) + "; ".join(counts))
        lines = []
        for rest, row in sorted(table.items(), key=lambda item: min(item[1].values())):
            lines.append([*rest, *(f"**{row[level]}**" if level == min(row, key=row.get) else
                                   row.get(level, "") for level in levels)])
        header = [*(other for other in FACTORS if other != factor),
                  *(level if factor == "pe_type" else f"{factor} {level}" for level in levels)]
        parts.append(folded(summary, markdown(header, lines)))
    return "\n\n".join(parts)

def seeds_table(runs):
    """Differences between encodings, and which of them are smaller than what another seed changes."""
    parts = []
    for name, title in LOSSES.items():
        levels, _, complete = matched(runs, "pe_type", name)
        pairs, lines, noise = list(combinations(levels, 2)), [], 0
        for rest, row in sorted(complete.items()):
            seeds = min(level.seeds for level in row.values())
            if seeds > 1:
                lines.append([*rest, seeds, *(row[level] for level in levels)])
                for a, b in pairs:
                    change = row[b].mean - row[a].mean
                    small = abs(change) < max(row[a].spread, row[b].spread)
                    noise += small
                    lines[-1].append(f"{change:+.4f}" + " (noise)" * small)
        if not lines:
            return "No configuration has several seeds for every encoding: differences may be noise."
        header = [*FACTORS[1:], "seeds", *levels, *(f"{b} − {a}" for a, b in pairs)]
        parts.append(f"{title.capitalize()}, mean ± standard deviation over seeds; {noise} of the "
                     f"{len(lines) * len(pairs)} differences between encodings are noise, smaller than the "
                     f"larger of the two standard deviations:\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)

def published_table(runs):
    """How far our losses are from the published ones, and whether they rank configurations alike."""
    lines = []
    for name, title in LOSSES.items():
        for ours, how in ((f"published_{name}", "as published, attention dropout on in evaluation"),
                          (name, "correct, no dropout in evaluation")):
            pairs = [(loss(runs[run], ours).mean, float(row[name])) for run, (row,) in read(PUBLISHED).items()
                     if row[name] and loss(runs.get(run, []), ours)
                     and row["setting"].items() <= runs[run][0]["setting"].items()]
            if pairs:
                rank, apart = spearman(pairs), statistics.mean(abs(a - b) for a, b in pairs)
                lines.append([title, how, len(pairs), f"{apart:.4f}", "" if rank is None else f"{rank:.3f}"])
    if not lines:
        return "No run has the settings of a published one, so there is nothing to compare."
    return markdown(["loss", "our evaluation", "runs", "mean absolute difference", "Spearman"], lines)

TABLES = {"summary": summary_table, "runs": runs_table,
          **{factor: partial(factor_tables, factor=factor) for factor in FACTORS},
          "seeds": seeds_table, "published": published_table}

# --- Figures ---------------------------------------------------------------------------------------------
matplotlib.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "grid.color": "0.93", "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11,
    "figure.constrained_layout.use": True, "legend.frameon": False})

def handle(label, color, **style):
    """A line of a legend."""
    return Line2D([], [], label=label, color=color, **{"linestyle": "", "marker": "o"} | style)

def encodings(runs):
    """The lines of a legend that name the colours."""
    drawn = {run.pe_type for run in runs}
    return [handle(text, color) for pe, (color, text) in PES.items() if pe in drawn]

def losses_figure(runs):
    """Train against val loss: the further above the diagonal, the more a run overfits."""
    points = {run: (loss(rows, "train_loss"), loss(rows, "val_loss")) for run, rows in runs.items()}
    points = {run: (train.mean, val.mean) for run, (train, val) in points.items() if train and val}
    if not points:
        return None
    figure = Figure(figsize=(6.4, 5.2))
    axes = figure.subplots()
    markers = dict(zip(sorted({run.n_embd for run in points}), cycle("os^D")))
    for run, point in points.items():
        axes.plot(*point, markers[run.n_embd], color=PES[run.pe_type][0], markersize=7,
                  markeredgecolor="white")
    handles = encodings(points)
    handles += [handle(f"{n_embd} channels wide", "0.5", marker=marker) for n_embd, marker in markers.items()]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    ends = max(left, bottom), min(right, top)
    if ends[0] < ends[1]:  # the diagonal crosses the figure
        axes.autoscale(False)
        axes.plot(ends, ends, color="0.6", linewidth=1, linestyle="--", zorder=0)
        handles.append(handle("both losses equal", "0.6", linewidth=1, linestyle="--", marker=""))
    seeds = ", mean over seeds" if any(len(rows) > 1 for rows in runs.values()) else ""
    axes.set(xlabel="final train loss", ylabel="final val loss",
             title=f"Final losses of {len(points)} runs{seeds}")
    axes.legend(handles=handles, title="Positional encoding and width", alignment="left")
    return figure

def pe_figure(runs):
    """What the encodings change in each configuration: the loss less their mean."""
    tables = {name: matched(runs, "pe_type", name)[2] for name in LOSSES}
    rests = sorted({rest for table in tables.values() for rest in table}, reverse=True)
    if not rests:
        return None
    figure = Figure(figsize=(9.6, 1.6 + 0.3 * len(rests)))
    for axes, (name, table) in zip(figure.subplots(1, 2, sharey=True), tables.items()):
        for rest, row in table.items():
            middle = statistics.mean(level.mean for level in row.values())
            for level, (center, deviation, _) in row.items():
                y = rests.index(rest) + 0.2 * (2 - list(PES).index(level))  # side by side
                axes.errorbar(center - middle, y, xerr=deviation or None, color=PES[level][0], fmt="o",
                              markersize=7, markeredgecolor="white", elinewidth=1)
        axes.axvline(0, color="0.7", linewidth=1, zorder=0)
        axes.locator_params(axis="x", nbins=6)
        axes.set(xlabel=f"{LOSSES[name]} less the mean of the encodings", ylim=(-0.6, len(rests) - 0.4),
                 title=f"{LOSSES[name].capitalize()} by encoding")
        axes.set_yticks(range(len(rests)), ["{} wide, {} heads, {} layers".format(*rest) for rest in rests])
    bar = handle("standard deviation over seeds", "0.5", linestyle="-", marker="")
    several = any(len(rows) > 1 for rows in runs.values())
    handles = encodings(run for run in runs if run.experiment == "gpt_v3") + [bar] * several
    figure.legend(handles=handles, ncols=4, loc="outside upper right")
    return figure

FIGURES = {"losses": losses_figure, "pe": pe_figure}

# --- Main ------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="a CSV of sweep.sh")
    parser.add_argument("--check", action="store_true", help="write nothing, status 1 if something differs")
    args = parser.parse_args()
    runs, stale = read(args.csv), []

    def fill(match):
        if match[2] not in TABLES:
            fail(f"{README.name}: there is no table {match[2]}; there are {', '.join(TABLES)}")
        new = f"{match[1]}{TABLES[match[2]](runs)}\n{match[3]}"
        if new != match[0]:
            stale.append(f"{README.name}, table {match[2]}")
        return new

    block = re.compile(rf"(<!-- report:{re.escape(args.csv.stem)} (\w+) -->\n).*?(<!-- /report -->)", re.S)
    old = README.read_text(encoding="utf-8") if README.exists() else ""
    new = block.sub(fill, old)
    sources = b"".join(path.read_bytes() for path in (args.csv, PUBLISHED, Path(__file__)))
    made_from = hashlib.sha256(sources).hexdigest()
    figures = {args.csv.with_name(f"{args.csv.stem}_{name}.png"): figure
               for name, draw in FIGURES.items() if (figure := draw(runs))}
    stale += [path for path in figures
              if not path.exists() or made_from.encode() not in path.read_bytes()]
    if args.check:
        if stale:
            fail(f"{stale[0]} is not what {args.csv} gives; write it with report.py {args.csv}", 1)
        return

    if not block.search(old):
        print("\n\n".join(f"## {name}\n\n{table(runs)}" for name, table in TABLES.items()))
    if new != old:
        README.write_text(new, encoding="utf-8")
    for path, figure in figures.items():
        figure.savefig(path, dpi=140, metadata={"Source": made_from})
    print(f"{args.csv}: {found(runs)} of 56 runs", file=sys.stderr)

if __name__ == "__main__":
    main()
