"""Writes the tables of README.md and the figures from the CSVs in this folder.

    python results/report.py                      # laptop.csv beside seed.csv, the published losses
    python results/report.py --check              # write nothing, fail if a table or a figure is out of date
    python results/report.py results/sweep.csv    # print the tables of another sweep, draw figures beside it

A table goes from <!-- report NAME --> to <!-- /report -->, in the README.md here or in the folder above. A
CSV may hold any part of the sweep, with one seed a run or several, but one setting of all other flags.
"""
import argparse, csv, hashlib, math, re, shlex, statistics, sys
from collections import Counter, defaultdict, namedtuple
from itertools import combinations, product
from pathlib import Path
try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError:
    sys.exit("report.py: error: matplotlib is missing; pip install -r requirements.txt brings it")

HERE = Path(__file__).resolve().parent
LAPTOP, PUBLISHED, CHOICES = (HERE / f"{name}.csv" for name in ("laptop", "seed", "choices"))
LOSSES = {"val_loss": "val loss", "train_loss": "train loss"}
COLUMNS = [f"{title}, {whose}" for title in LOSSES.values() for whose in ("published", "ours")]
PES = {"learned": ("black", "learned vectors (gpt, gpt_v2)"),
       "randn": ("#e69f00", "fixed random vectors (randn)"),
       "sinpe": ("#0072b2", "sines and cosines (sinpe)"),
       "rope": ("#009e73", "rotations (rope)")}
LEVELS = {"pe_type": ["randn", "sinpe", "rope"], "n_embd": [384, 768], "n_head": [6, 8, 12],
          "n_layer": [6, 8, 12]}  # what the published runs combine
SMALLER = {"n_embd": 4, "n_layer": 2}  # what sweep.sh --tiny divides by

Run = namedtuple("Run", "experiment pe_type n_embd n_head n_layer")  # a small one stands for a large one
GRID = {Run("gpt", "learned", 384, 6, 6), Run("gpt_v2", "learned", 384, 6, 6),
        *(Run("gpt_v3", *levels) for levels in product(*LEVELS.values()))}

def fail(message, status=2):
    """End the program with one line on standard error; status 1 says that --check found a difference."""
    print(f"report.py: error: {message}", file=sys.stderr)
    sys.exit(status)

# --- Reading ---------------------------------------------------------------------------------------------
def read(path):
    """The rows of a CSV of the scripts, equal ones once, with their Run, flags and curve."""
    numbers = {*LOSSES, *(f"published_{name}" for name in LOSSES), "best_val_loss", "train_s", "params",
               "ms_per_iter"}
    needed = {*Run._fields, *numbers, "device", "torch", "data_crc32", "flags", "curve"}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(file)
        header, *table = list(csv.reader(lines)) or [list(needed)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path}: {error}")
    if not needed <= set(header):
        fail(f"{path}: it is not a CSV of the sweep")
    rows = {}
    for number, cells in enumerate(table, 2):
        try:
            row = dict(zip(header, cells, strict=True))
            run = Run(row["experiment"], row["pe_type"], *(int(row[name]) for name in Run._fields[2:]))
            words = shlex.split(row["flags"])
            flags = dict(zip(words[::2], words[1::2], strict=True)) | {"text": row["data_crc32"]}
            curve = [(float(step), float(train), float(val)) for step, train, val in
                     (point.split(":") for point in row["curve"].split())]
            row |= {name: float(row[name]) for name in numbers if row[name]}
            if run.pe_type not in PES or number > len(table) and not lines[-1].endswith("\n"):
                raise ValueError
        except ValueError:
            fail(f"{path}: line {number} is damaged or cut off")
        rows.setdefault((run.experiment, *flags.items()), row | {"run": run, "flags": flags, "curve": curve})
    return [rows[key] for key in sorted(rows)]  # not in the order in which they came

def sweep(path):
    """A CSV with one setting of all flags but those of a Run -> {Run: [row of each seed]}."""
    runs, rows = defaultdict(list), read(path)
    for row in rows:
        row["flags"] = {name: value for name, value in row["flags"].items()
                        if name not in ("--n_embd", "--n_head", "--n_layer", "--pe", "--seed")}
        run = row["run"]
        large = run._replace(n_embd=run.n_embd * 4, n_layer=run.n_layer * 2)
        runs[large if run.n_embd in (96, 192) else run].append(row)
    for name in sorted({name for row in rows for name in row["flags"]}):
        scripts = {row["experiment"] for row in rows if name in row["flags"]}  # that have such a flag
        values = {row["flags"].get(name, "none") for row in rows if row["experiment"] in scripts}
        if len(values) > 1:
            fail(f"{path}: rows differ in {name} ({', '.join(sorted(values))}); a report is of one setting")
    return dict(runs)

class Loss(namedtuple("Loss", "mean spread seeds")):
    """A loss over the seeds of a run: '1.506', or with several '1.506 ± 0.002', the standard deviation."""
    def __str__(self):
        return f"{self.mean:.3f}" + f" ± {self.spread:.3f}" * (self.seeds > 1)

def loss(rows, name):
    """The Loss in a column of a run's rows, '' where nothing was measured."""
    values = [row[name] for row in rows if row[name] != ""]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Loss(statistics.mean(values), spread, len(values)) if values else ""

def losses(runs, name):
    return {run: value for run, rows in runs.items() if (value := loss(rows, name))}

def configurations(values, factor):
    """gpt_v3's losses with all levels of a factor, the rest being the same: {rest: {level: Loss}}."""
    table = defaultdict(dict)
    for run, value in values.items():
        if run.experiment == "gpt_v3":
            table[run._replace(**{factor: None})][getattr(run, factor)] = value
    return {rest: row for rest, row in table.items() if row.keys() >= set(LEVELS[factor])}

def spearman(pairs):
    """Rank correlation of (x, y) pairs, ties at their mean rank; None where there is none."""
    ranks = [[sum(other < value for other in column) + column.count(value) / 2 for value in column]
             for column in zip(*pairs)]
    flat = not ranks or any(len(set(column)) == 1 for column in ranks)
    return None if flat else statistics.correlation(*ranks)

# --- Findings --------------------------------------------------------------------------------------------
WIDE = {"n_embd": 768}
FINDINGS = [  # what was published of gpt_v3: a level has the lowest or the highest loss of its factor, where
    ("n_embd", 768, "lowest", "train_loss", {}), ("n_embd", 768, "highest", "val_loss", {}),
    ("n_layer", 12, "lowest", "train_loss", {}), ("n_layer", 12, "highest", "val_loss", {}),
    ("pe_type", "sinpe", "lowest", "val_loss", {}), ("pe_type", "sinpe", "highest", "train_loss", WIDE),
    ("pe_type", "rope", "lowest", "train_loss", WIDE), ("pe_type", "rope", "highest", "val_loss", WIDE),
    ("pe_type", "randn", "lowest", "train_loss", WIDE | {"n_head": 12, "n_layer": 12}),
    ("n_head", 12, "highest", "train_loss", WIDE | {"pe_type": "rope"})]

def findings(runs):
    """Every finding in pairs of losses: [(finding, column of the losses, [(a, b), a said to be lower])]."""
    train, val = losses(runs, "train_loss"), losses(runs, "val_loss")
    order = sorted(train.keys() & val.keys(), key=lambda run: (train[run], run), reverse=True)
    small = {run for run in val if (run.n_embd, run.n_layer) == (384, 6)}
    means = lambda pairs: [(val[a].mean, val[b].mean) for a, b in pairs]
    found = [("of two runs, the lower train loss goes with the higher val loss", "val_loss",
              means(combinations(order, 2))),
             ("n_embd 384 with n_layer 6 has the lowest val losses", "val_loss",
              means(product(sorted(small), sorted(val.keys() - small))))]
    for factor, level, end, name, where in FINDINGS:
        values, pairs = losses(runs, name), []
        for run, other in product(values, LEVELS[factor]):
            rival = run._replace(**{factor: other})
            if run == run._replace(**where, **{factor: level}) != rival and rival in values:
                pairs.append((values[run].mean, values[rival].mean)[::1 if end == "lowest" else -1])
        place = "".join(f", {other} {at}" for other, at in where.items())
        found.append((f"{factor} {level} has the {end} {LOSSES[name]}{place}", name, pairs))
    for name, title in LOSSES.items():
        tables = {factor: configurations(losses(runs, name), factor).values() for factor in LEVELS}
        moves = {factor: statistics.mean(max(row.values()).mean - min(row.values()).mean for row in table)
                 for factor, table in tables.items() if table}
        heads = [moves.pop("n_head")] if "n_head" in moves else []
        found.append((f"n_head moves the {title} less than the other factors", name,
                      list(product(heads, moves.values()))))
    return found

# --- Tables ----------------------------------------------------------------------------------------------
def markdown(header, rows):
    """A Markdown table, numbers to the right."""
    columns = ["".join(map(str, cells)) for _, *cells in zip(header, *rows)]
    align = ["---:" if re.match(r"[-+*\d]", column) else "---" for column in columns]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, align, *rows))

def size(factor, level, runs):
    """A level of a factor: '384 (96)' where a small run stands for a large one."""
    small = factor in SMALLER and any(rows[0]["run"] != run for run, rows in runs.items())
    return f"{level} ({level // SMALLER[factor]})" if small else level

def summary_table(published, ours):
    """How much of the sweep there is, and how it was run."""
    rows = sum(ours.values(), [])
    flags = max((row["flags"] for row in rows), key=len, default={})
    where = [", ".join(sorted({row[name] or "unknown" for row in rows})) for name in ("device", "torch")]
    return (f"{len(ours.keys() & GRID)} of 56 runs, {len(rows)} rows. Device: {where[0]}; torch: {where[1]}; "
            f"{sum(row['train_s'] or 0 for row in rows) / 3600:.2f} hours of training. Flags: "
            f"`{' '.join(f'{name} {value}' for name, value in flags.items() if name != 'text')}`")

def prediction_table(published, ours):
    """How alike both sweeps rank the runs that they share, and how far apart they are if the flags agree."""
    groups = [("all", {}, ""), *((f"{factor} {size(factor, level, ours)}", {factor: level}, "")
                                 for factor in ("pe_type", "n_embd") for level in LEVELS[factor]),
              ("all, ours evaluated as published", {}, "published_")]
    same = all(published[run][0]["flags"].items() <= ours[run][0]["flags"].items()
               for run in published.keys() & ours)
    lines = []
    for label, where, how in groups:
        lines.append([label])
        for name in LOSSES:
            a, b = losses(published, name), losses(ours, how + name)
            pairs = [(a[run].mean, b[run].mean) for run in a.keys() & b if run == run._replace(**where)]
            rank = spearman(pairs)
            lines[-1] += [len(pairs), "" if rank is None else f"{rank:.2f}"]
            if same:
                lines[-1].append(f"{statistics.mean(abs(x - y) for x, y in pairs):.4f}" if pairs else "")
    header = [cell for title in LOSSES.values()
              for cell in ("n", f"Spearman, {title}", *["mean absolute difference"] * same)]
    return markdown(["runs", *header], lines)

def findings_table(published, ours):
    """Each finding: in how many pairs of runs it holds, by how much on average, and what ours say to it."""
    lines, spreads = [], {}
    for name in LOSSES:
        variances = [value.spread ** 2 for value in losses(ours, name).values() if value.seeds > 1]
        spreads[name] = math.sqrt(2 * statistics.mean(variances)) if variances else 0
    for (text, name, theirs), (*_, pairs) in zip(findings(published), findings(ours)):
        cells = []
        for pairs in (theirs, pairs):
            held, gap = sum(a < b for a, b in pairs), statistics.mean(b - a for a, b in pairs or [(0, 0)])
            cells.append(f"{held} of {len(pairs)}, {gap:+.3f}" if pairs else "")
        cells.append("" if not pairs else "within the spread of seeds" if abs(gap) < spreads[name] else
                     "reproduced" if held >= 2 / 3 * len(pairs) else "not reproduced")
        lines.append([text, *cells])
    seeds = "; ".join(f"{title} {spreads[name]:.3f}" for name, title in LOSSES.items() if spreads[name])
    return (markdown(["finding", "published", "ours", "verdict"], lines)
            + f"\n\nSpread of seeds: {seeds or 'unknown, there is one seed a run'}.")

def comparisons_table(published, ours):
    """The mean loss of a level, and how often it is the lowest, where both sweeps have all levels."""
    lines = []
    for factor, levels in LEVELS.items():
        columns = []
        for name in LOSSES:
            both = [configurations(losses(runs, name), factor) for runs in (published, ours)]
            whole = [rest for rest in both[0] if rest in both[1]]
            for table in both:
                wins = Counter(min(table[rest], key=table[rest].get) for rest in whole)
                columns.append([f"{statistics.mean(table[rest][level].mean for rest in whole):.3f} "
                                f"({wins[level]} of {len(whole)})" if whole else "" for level in levels])
        lines += [[factor, size(factor, level, ours), *cells] for level, *cells in zip(levels, *columns)]
    return markdown(["factor", "level", *COLUMNS], lines)

def runs_table(published, ours):
    """Every run, our lowest val loss first."""
    columns = [losses(runs, name) for name in LOSSES for runs in (published, ours)]
    columns.append(losses(ours, "best_val_loss"))
    lines = [[run.experiment, *(size(factor, getattr(run, factor), ours) for factor in LEVELS),
              *(values.get(run, "") for values in columns)] for run in sorted({*published, *ours})]
    lines.sort(key=lambda line: line[6] or (math.inf,))
    return (f"<details><summary>All {len(lines)} runs, by our val loss</summary>\n\n"
            + markdown([*Run._fields, *COLUMNS, "best val loss, ours"], lines) + "\n\n</details>")

def choices_table(published, ours):
    """What a flag of gpt_v3.py changes: rows of choices.csv that differ in the seed alone are one line."""
    groups, rows, lines = defaultdict(list), read(CHOICES), []
    for row in rows:
        groups[tuple(item for item in row["flags"].items() if item[0] != "--seed")].append(row)
    usual = {name: Counter(row["flags"].get(name) for row in rows).most_common(1)[0][0]
             for row in rows for name in row["flags"]}
    for flags, group in groups.items():
        other = " ".join(f"{name} {value}" for name, value in flags if value != usual[name])
        val, train, speed = (loss(group, name) for name in (*LOSSES, "ms_per_iter"))
        run, flags = group[0]["run"], defaultdict(int, flags)
        head = run.n_embd // run.n_head
        kept = {"mha": 2 * run.n_embd, "gqa": 2 * head * int(flags["--n_kv_head"]), "mqa": 2 * head,
                "mla": int(flags["--kv_rank"]) + head // 2 * (flags["--pe_at"] == "qk")}[flags["--attn"]]
        lines.append([f"`{other}`" if other else "nothing", len(group), val, train,
                      f"{group[0]['params']:,.0f}", speed and f"{speed.mean:.1f}", 2 * kept * run.n_layer])
    lines.sort(key=lambda line: line[2])
    return markdown(["what differs", "seeds", *LOSSES.values(), "params", "ms/iter", "cache"], lines)

TABLES = {"summary": summary_table, "prediction": prediction_table, "findings": findings_table,
          "comparisons": comparisons_table, "runs": runs_table, "choices": choices_table}

# --- Figures ---------------------------------------------------------------------------------------------
matplotlib.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.93",
    "axes.titlelocation": "left", "axes.titlesize": 10, "figure.titleweight": "bold",
    "figure.constrained_layout.use": True, "legend.frameon": False})

def titled(figure, title, runs, marks, columns):
    """The figure with a title and a legend: the colours of its runs, and further marks, {label: style}."""
    drawn = {run.pe_type for run in runs}
    marks = {text: {"color": color} for pe, (color, text) in PES.items() if pe in drawn} | marks
    lines = [Line2D([], [], label=label, **{"ls": "", "marker": "o", "color": "0.4"} | style)
             for label, style in marks.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=columns)
    figure.suptitle(title)
    return figure

def losses_figure(published, ours):
    """Train against val loss of the published runs, and of ours."""
    figure, markers, ranks = Figure(figsize=(9, 4.9)), {384: "o", 768: "s"}, []
    for axes, whose, runs in zip(figure.subplots(1, 2), ("Published", "Ours"), (published, ours)):
        train, val = losses(runs, "train_loss"), losses(runs, "val_loss")
        points = {run: (train[run].mean, val[run].mean) for run in train if run in val}
        for run, point in points.items():
            axes.plot(*point, markers.get(run.n_embd, "^"), color=PES[run.pe_type][0], markersize=7,
                      markeredgecolor="white")
        ranks.append(spearman(points.values()))
        known = "" if ranks[-1] is None else f", rank correlation {ranks[-1]:.2f}".replace("-", "−")
        axes.set(xlabel="final train loss", ylabel="final val loss",
                 title=f"{whose}: {len(points)} runs{known}")
    opposite = None not in ranks and max(ranks) < -0.5
    title = "The better a model fits its text, the worse it predicts new text" if opposite else "Final losses"
    widths = {f"channels wide: {size('n_embd', width, ours)}".replace("(", "(ours "): {"marker": marker}
              for width, marker in markers.items()}
    return titled(figure, title, {*published, *ours}, widths, 3)

def curves_figure(published, ours):
    """Losses during the training of the smallest, a middle and the largest gpt_v3."""
    curves = {run: curve for run, rows in ours.items() if run.experiment == "gpt_v3"
              and (curve := [point for point in rows[0]["curve"] if point[0]])}
    shapes = sorted({run[2:] for run in curves})  # width, heads and layers
    if not shapes:
        return None
    shapes = dict.fromkeys((shapes[0], shapes[len(shapes) // 2], shapes[-1]))
    figure, turned = Figure(figsize=(9, 4.6)), []
    for axes, shape in zip(figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0], shapes):
        for run in (run for run in curves if run[2:] == shape):
            (steps, train, val), color = zip(*curves[run]), PES[run.pe_type][0]
            at, own = val.index(min(val)), ours[run][0]["run"]
            axes.plot(steps, train, "--", color=color)
            axes.plot(steps, val, "-o", color=color, markevery=[at])
            turned.append(val[at] < val[-1] and train[at] > train[-1])
        axes.set(xlabel="iterations", ylabel="loss", title="{} wide, {} heads, {} layers".format(*own[2:]))
    title = f"In {sum(turned)} of {len(turned)} runs the val loss turns up as the train loss goes on falling"
    return titled(figure, title, curves, {"val loss": {"ls": "-", "marker": ""}, "lowest val loss": {},
                                          "train loss": {"ls": "--", "marker": ""}}, 2)

# --- Main ------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="?", default=LAPTOP, help="a CSV of sweep.sh")
    parser.add_argument("--check", action="store_true", help="write nothing, status 1 if something differs")
    args = parser.parse_args()
    own = args.csv.resolve() in (LAPTOP, CHOICES)  # the two that the pages are about
    args.csv = LAPTOP if own else args.csv
    published, ours, new, stale = sweep(PUBLISHED), sweep(args.csv), {}, []
    for page in (*HERE.glob("README.md"), *HERE.parent.glob("README.md")) if own else ():
        old = page.read_text(encoding="utf-8")
        new[page] = re.sub(r"(<!-- report (\w+) -->\n).*?(<!-- /report -->)", lambda block: (
            f"{block[1]}{TABLES[block[2]](published, ours)}\n{block[3]}"), old, flags=re.S)
        stale += [page] * (new[page] != old)
    sources = b"".join(path.read_bytes() for path in (args.csv, PUBLISHED, Path(__file__)))
    made_from, prefix = hashlib.sha256(sources).hexdigest(), "" if own else f"{args.csv.stem}_"
    figures = {args.csv.with_name(f"{prefix}{name}.png"): figure for name, draw in (
        ("losses", losses_figure), ("curves", curves_figure)) if ours and (figure := draw(published, ours))}
    stale += [path for path in figures if not path.exists() or made_from.encode() not in path.read_bytes()]
    if args.check:
        return fail(f"{stale[0]} is not what {args.csv} gives; report.py writes it", 1) if stale else None
    if not own:
        print("\n\n".join(f"## {name}\n\n{table(published, ours)}" for name, table in TABLES.items()
                          if name != "choices"))
    for page, text in new.items():
        page.write_text(text, encoding="utf-8")
    for path, figure in figures.items():
        figure.savefig(path, dpi=200, metadata={"Source": made_from})
    print(f"{args.csv}: {len(ours.keys() & GRID)} of 56 runs", file=sys.stderr)

if __name__ == "__main__":
    main()
