"""The model card: what a model is for, what it learned from, how it was compressed, and how good it is. One page.

After Mitchell et al. (2019), "Model cards for model reporting". Three files with the same content::

    MODEL_CARD.md     for a repository or an editor
    model_card.json   for programs
    model_card.html   for people: one file without scripts or links, the pictures inside

`sections` decides what the card says; the three writers only say it. Nothing names a patient or a case: data are counted,
pictures are numbered. The pictures themselves are slices of cases and are as confidential as the data set is.

`compression` lies below this package, so the card is written by who calls it (the command line).
"""

from __future__ import annotations

import base64
import html
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import processor
from ..compression import gate
from ..compression.gate import Limits, Measured
from ..config import PreprocessConfig, RunConfig
from ..errors import SetupError
from ..files import sha256_of_file, write_json, write_text
from ..models.spec import ModelSpec
from ..shards.manifest import SPLITS, Manifest

if TYPE_CHECKING:
    from ..inference.evaluate import Overlay

MARKDOWN, JSON, HTML = "MODEL_CARD.md", "model_card.json", "model_card.html"
SCHEMA = 1
VERDICTS = "Limits and verdicts"
WEAK_DICE = 0.5
"""A class with a lower mean Dice is named as one that the model does not find."""
FEW_PATIENTS = 50
"""Below so many test patients the card says that the intervals are wide for a reason."""


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    Attributes:
        spec: the model's contract; ``spec.run`` names it.
        created: ISO date.
        data: of `data_facts`.
        training: of `training_facts`.
        steps: of the compression, in order: {"do": ..., settings ...}; a key "outcome" holds a sentence about the result.
        split: the cases of all metrics.
        reference: the float model.
        candidates: the exported formats.
        limits, judged: the recipe's limits, and `gate.verdicts` by them.
        parity: format -> `parity.json` of its export.
        files: path inside the folder -> hex SHA-256, of `file_hashes`.
        versions: of `training.run.versions`.
        machine: {"cpu": ..., "cores": ...} of the measurement.
        measured: how latency was measured, such as {"runs": 30, "threads": {"one": 1, "all": 2}, "instruction_sets": ["avx2"]};
            `measure` returns all.
        latency_of: what the float model's latency is of, such as "float32 TFLite conversion".
        commands: (what it does, command) each; paths as seen from the card's folder, for it will be moved.
        overlays: worst and best cases of ``pictured``; () for none.
        pictured: the format whose answers the pictures show.
        intended_use: own words instead of the general ones; "" for those.
        notes: further sentences for the section on limitations.
    """

    spec: ModelSpec
    created: str
    data: Mapping[str, Any]
    training: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    split: str
    reference: Measured
    candidates: Sequence[Measured]
    limits: Limits
    judged: Mapping[str, Sequence[str]]
    parity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    latency_of: str = ""
    commands: Sequence[tuple[str, str]] = ()
    overlays: Sequence[Overlay] = ()
    pictured: str = ""
    intended_use: str = ""
    notes: Sequence[str] = ()

    @property
    def released(self) -> list[str]:
        """Formats that missed no limit."""
        return [one.format for one in self.candidates if not self.judged[one.format]]


def write_card(folder: str | Path, card: Card) -> list[Path]:
    """Write the three files into ``folder``, each atomically.

    Raises:
        SetupError: the packages that draw the page are missing.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SetupError(
            f"the model card needs {error.name}, which is not installed; `pip install hvd_imaging[train]` brings it"
        ) from error
    folder = Path(folder)
    parts = sections(card)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hvd_imaging.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("card.html.j2").render(
        title=title(card), summary=summary(card), sections=parts, pictures=pictures(card), pictures_after=VERDICTS
    )
    write_text(folder / HTML, page)
    write_text(folder / MARKDOWN, markdown(card, parts))
    write_json(folder / JSON, to_json(card))
    return [folder / name for name in (HTML, MARKDOWN, JSON)]


# --- facts ----------------------------------------------------------------------------------------------------------


def data_facts(manifest: Manifest) -> dict[str, Any]:
    """What a card may say of a dataset: counts and ranges, nothing of single cases.

    Returns:
        ``dataset_hash``, ``cases``, ``patients`` and ``sites`` of each split (0 sites: not recorded), ``modalities`` (cases
        of each), ``spacing_mm`` and ``shape``: ([smallest of each axis], [largest]) of the stored volumes, ``with_class``:
        class -> split -> cases that hold it.
    """
    samples = manifest.samples
    by_split = {split: manifest.of_split(split) for split in SPLITS}

    def holds(sample: Any, index: int) -> bool:
        return sample.label == index if sample.class_voxels is None else sample.class_voxels[index] > 0

    spacings = [s.spacing for s in samples if s.geometry != "none"]
    shapes = [s.shape[:3] for s in samples]
    modalities = [s.modality or "unknown" for s in samples]
    return {
        "dataset_hash": manifest.hash(),
        "cases": {split: len(found) for split, found in by_split.items()},
        "patients": {split: len({s.patient for s in found}) for split, found in by_split.items()},
        "sites": {split: len({s.site for s in found if s.site}) for split, found in by_split.items()},
        "sites_in_all": len({s.site for s in samples if s.site}),
        "modalities": {name: modalities.count(name) for name in sorted(set(modalities))},
        "spacing_mm": _range(spacings),
        "shape": _range(shapes),
        "with_class": {
            name: {split: sum(holds(s, index) for s in found) for split, found in by_split.items()}
            for index, name in enumerate(manifest.classes)
            if manifest.task == "classification" or index > 0
        },
    }


def _range(values: Sequence[Sequence[float]]) -> list[list[float]] | None:
    if not values:
        return None
    columns = list(zip(*values, strict=True))
    return [[min(column) for column in columns], [max(column) for column in columns]]


def training_facts(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that a reader asks for first; the whole of them is in its `run.yaml`."""
    train, data = config.train, config.data
    return {
        "network": config.model.model_dump(mode="json", exclude_defaults=True),
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "optimizer": train.optimizer,
        "learning_rate": train.learning_rate,
        "loss": train.loss,
        "seed": train.seed,
        "patch": list(data.patch),
        "augmentation": data.augment is not None,
    }


def file_hashes(folder: str | Path) -> dict[str, str]:
    """Path inside ``folder`` -> hex SHA-256 of every file, but the card's own."""
    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    own = {root / name for name in (MARKDOWN, JSON, HTML)}
    return {path.relative_to(root).as_posix(): sha256_of_file(path) for path in files if path not in own}


# --- what the card says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A part of a section.

    Attributes:
        kind: "text", "list", "facts" (two columns without a head), "table" or "code".
        text: of "text" and "code".
        items: of "list".
        head, rows: of "table"; rows of "facts".
        caption: a line above a table.
    """

    kind: str
    text: str = ""
    items: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    caption: str = ""


@dataclass(frozen=True)
class Part:
    """A section: its heading and blocks."""

    heading: str
    blocks: Sequence[Block]


def title(card: Card) -> str:
    """The page's name."""
    return f"Model card: {card.spec.run}"


def summary(card: Card) -> str:
    """The card in two sentences."""
    spec = card.spec
    what = (
        f"marks {_listed(spec.classes[1:])}" if spec.task == "segmentation" else f"tells {_listed(spec.classes)} apart"
    )
    kind = "image slices or projections" if spec.is_2d else "volumes"
    judged = "No exported format keeps all limits, so none is released."
    if card.released:
        refused = [one.format for one in card.candidates if card.judged[one.format]]
        judged = f"Released: {_listed(card.released)}." + (f" Not released: {_listed(refused)}." if refused else "")
    return f"A {spec.model.name} network that {what} in {_modalities(card)} {kind}. {judged}"


def sections(card: Card) -> list[Part]:
    """All of the card but its pictures, in reading order."""
    return [
        Part("Use", _use(card)),
        Part("Figures", _figures(card)),
        Part(VERDICTS, _verdicts(card)),
        Part("Data", _data(card)),
        Part("Preprocessing", [Block("facts", rows=preprocessing_rows(card.spec))]),
        Part("Training", _training(card)),
        Part("Compression", _compression(card)),
        Part("Agreement of the exports with the trained network", _parity(card)),
        Part("How to run it", _commands(card)),
        Part("Versions and check sums", _versions(card)),
    ]


def _use(card: Card) -> list[Block]:
    spec = card.spec
    task = (
        f"Segmentation of {_listed(spec.classes[1:])}: every voxel gets one class."
        if spec.task == "segmentation"
        else f"Classification of whole images as {_listed(spec.classes, 'or')}."
    )
    use = card.intended_use or (
        f"{task} For research on {_modalities(card)} images that were acquired and preprocessed like those below; a qualified "
        "person looks at every result."
    )
    return [
        Block("facts", rows=[("Intended use", use)]),
        Block("text", text="Not for:"),
        Block(
            "list",
            items=[
                "Diagnosis, treatment planning, triage, or any decision about a patient: this is not a medical device, and no "
                "authority has assessed it.",
                "Other modalities, scanners, protocols, body regions or age groups than those of the data: nothing is known "
                "about them.",
                "Use without supervision: a probability is not a measured chance of being right, and the model does not "
                "notice images that it was not made for.",
            ],
        ),
        Block("text", text="What the figures cannot say:"),
        Block("list", items=limitations(card)),
    ]


def limitations(card: Card) -> list[str]:
    """What follows from the numbers of this card."""
    data, found = card.data, weaknesses(card) + hidden_losses(card)
    patients = data["patients"].get(card.split, 0)
    cases = data["cases"].get(card.split, 0)
    if patients < FEW_PATIENTS:
        found.append(
            f"All metrics rest on {_count(cases, 'case')} of {_count(patients, 'patient')} ({card.split} split): the "
            "intervals are wide, and rare failures can be missing."
        )
    if data["sites_in_all"] == 0:
        found.append("The institution of the cases is not recorded: whether the model works elsewhere was not tested.")
    elif data["sites_in_all"] == 1:
        found.append("All cases are from one institution: whether the model works elsewhere was not tested.")
    if card.split == "val":
        found.append("The cases of these figures also chose the best epoch, so the figures are a little too good.")
    found += processor_notes(card)
    found.append("Age, sex and disease stage are not part of the data set: differences between such groups were not looked at.")
    if card.spec.task == "segmentation":
        found.append("The truth is a person's or a program's contour, with its own error; Dice cannot be better than that.")
    return [*found, *card.notes]


INTEGERS = ("tflite-dynamic", "tflite-int8", "onnx-int8")


def processor_notes(card: Card) -> list[str]:
    """For which kind of processor the released integer formats are known to be fast."""
    sets = card.measured.get("instruction_sets")
    integers = [name for name in card.released if name in INTEGERS]
    if not sets or not integers:
        return []
    text = f"The times of {_listed(integers)} were measured on {processor.kind(sets)} and hold for such processors only"
    if processor.has_integers(sets):
        text += (
            ": on AVX2 without VNNI, integers of a U-Net were 0.92 x as fast as the trained network in TensorFlow where they are 2.3 x "
            "with VNNI (docs/compression.md). Measure there before choosing them for speed"
        )
    return [f"{text}. That the answers are the same is looked at on each machine, with the golden patches of the export."]


def weaknesses(card: Card) -> list[str]:
    """What the float model itself does badly: a compressed one that keeps it is released, and not good for it either."""
    found = []
    metrics = card.reference.metrics
    if card.spec.task == "segmentation":
        classes = card.spec.classes[1:]
        for name in classes:
            value = metrics.get(gate.of_class("dice", name) if len(classes) > 1 else "dice", {}).get("value")
            if value is not None and value < WEAK_DICE:
                found.append(f"The float model itself finds {name} badly (mean Dice {value:.2f}): do not use any format for it.")
        return found
    low = (metrics.get("auc", {}).get("interval") or [1.0])[0]
    if low <= 0.5:
        found.append(
            f"The float model's AUC is {metrics['auc']['value']:.2f} with an interval from {low:.2f}: it is not shown to be better "
            "than guessing, and neither is any format."
        )
    return found


def hidden_losses(card: Card) -> list[str]:
    """What released formats do worse than the float model where no limit looks: single classes, and distances."""
    found = []
    for one in card.candidates:
        if one.format not in card.released:
            continue
        for key, change in one.differences.items():
            if change.value is None or key in gate.JUDGED[card.spec.task]:
                continue
            if key.startswith("hd95"):
                if change.interval is not None and change.interval[0] > 0:
                    found.append(
                        f"{one.format} is released by Dice, but its HD95 is larger by {change.value:.2f} mm (interval "
                        f"{change.interval[0]:.2f} to {change.interval[1]:.2f}): single voxels far away count there."
                    )
            elif card.limits.metric_loss is not None and change.value < -card.limits.metric_loss:
                found.append(
                    f"{one.format} is released by the mean of all classes, but {gate.figure_name(key)} alone falls by "
                    f"{-change.value:.2f} points."
                )
    return found


def _figures(card: Card) -> list[Block]:
    machine, threads = card.machine, card.measured.get("threads", {})
    patch = " x ".join(map(str, card.spec.patch))
    timing = f"Time is the median for one patch of {patch} voxels"
    runs = card.measured.get("runs")
    if runs:
        count = min(runs.values()) if isinstance(runs, Mapping) else runs
        timing += f" over {count} runs in fresh processes that take turns"
    spread = _spread([card.reference, *card.candidates])
    if spread is not None:
        timing += f", and the middle half of them lies within {spread:.0%} of it"
    if threads:
        timing += f"; all threads: {threads.get('all')}"
    if machine.get("cpu"):
        timing += f"; {machine['cpu']}, {machine.get('cores')} cores"
    sets = card.measured.get("instruction_sets")
    if sets:
        timing += f", {processor.kind(sets)} ({' '.join(sets)})"
    timing += "."
    if card.latency_of:
        timing += f" The float model's time is that of its {card.latency_of}."
    return [
        Block("table", head=gate.COST_HEAD, rows=gate.cost_rows(card.reference, card.candidates, card.judged), caption="Cost"),
        Block(
            "text",
            text=f"{timing} Memory is the most that the whole process held, libraries included. In brackets: times as small, "
            "few or fast as the float model. MACs: multiplications with addition for one patch.",
        ),
        Block(
            "table",
            head=gate.METRIC_HEAD,
            rows=gate.metric_rows(card.reference, card.candidates),
            caption=f"Quality on the {card.split} split",
        ),
        Block(
            "text",
            text=f"{_GLOSSARY[card.spec.task]} Difference: the format's figure minus that of the float model, the network as it was "
            "trained, on the same cases; 1 point is 0.01. Intervals hold 95%, those of differences by a paired bootstrap over cases."
            + _difference_notes(card),
        ),
    ]


def _spread(models: Sequence[Measured]) -> float | None:
    """The largest distance of a quartile from its median, as a share of it."""
    found = [
        abs(side / median - 1)
        for one in models
        for key, median in one.latency_ms.items()
        for side in one.spread_ms.get(key) or ()
        if median
    ]
    return max(found, default=None)


_GLOSSARY = {
    "segmentation": "Dice: overlap with the truth, 1 is perfect; the mean over cases of the mean over classes. HD95: 95% of the "
    "surface lies closer to the true one than this, 0 is perfect.",
    "classification": "Accuracy: share of right answers. Recall: share found of those that are there (of the second of two "
    "classes, else the mean over classes). AUC: area under the ROC curve, 0.5 is guessing.",
}


def _difference_notes(card: Card) -> str:
    notes: dict[str, list[str]] = {}
    for one in card.candidates:
        for name, change in one.differences.items():
            if change.note:
                notes.setdefault(change.note, []).append(f"{one.format} ({gate.figure_name(name)})")
    return "".join(f" {note[0].upper()}{note[1:]}: {', '.join(where)}." for note, where in notes.items())


def _verdicts(card: Card) -> list[Block]:
    limits = card.limits
    asked = []
    if limits.metric_loss is not None:
        names = _listed([gate.NAMES[name] for name in gate.JUDGED[card.spec.task]])
        asked.append(f"{names}: at most {limits.metric_loss:g} points below the float model (point estimate)")
    for key, value in (("faster", limits.faster), ("smaller", limits.smaller)):
        if value is not None:
            where = ", on one thread and on all" if key == "faster" else " on disk"
            sets = card.measured.get("instruction_sets")
            where += f", on {processor.kind(sets)}" if sets and key == "faster" else ""
            asked.append(f"{key} than the float model{where}" if value == 1 else f"at least {value:g} x {key}{where}")
    for text, most in (
        ("a patch on one thread within", limits.max_latency_ms and gate.time_text(limits.max_latency_ms)),
        ("on disk at most", limits.max_bytes and gate.size_text(limits.max_bytes)),
        ("memory at most", limits.max_peak_bytes and gate.size_text(limits.max_peak_bytes)),
    ):
        if most:
            asked.append(f"{text} {most}")
    rows = [
        (one.format, "not released" if card.judged[one.format] else "released", "; ".join(card.judged[one.format]) or "-")
        for one in card.candidates
    ]
    return [
        Block("text", text=f"Asked for: {'; '.join(asked)}." if asked else "No limits were set."),
        Block("table", head=("format", "verdict", "missed"), rows=rows),
    ]


def _data(card: Card) -> list[Block]:
    data = card.data
    rows = [
        (name, *(str(data[key].get(split, 0)) for split in SPLITS))
        for name, key in (("cases", "cases"), ("patients", "patients"))
    ]
    if data["sites_in_all"]:
        rows.append(("institutions", *(str(data["sites"].get(split, 0)) for split in SPLITS)))
    rows += [
        (f"cases with {name}", *(str(counts.get(split, 0)) for split in SPLITS)) for name, counts in data["with_class"].items()
    ]
    facts = [("Modality", ", ".join(f"{name} ({_count(count, 'case')})" for name, count in data["modalities"].items()))]
    if data["spacing_mm"]:
        facts.append(("Spacing (D, H, W)", _span(data["spacing_mm"], "mm")))
    if data["shape"]:
        facts.append(("Size (D, H, W)", _span(data["shape"], "voxels")))
    if not data["sites_in_all"]:
        facts.append(("Institutions", "not recorded"))
    facts.append(("Hash of the content", data["dataset_hash"]))
    return [Block("table", head=("", *SPLITS), rows=rows), Block("facts", rows=facts)]


def _span(values: Sequence[Sequence[float]], unit: str) -> str:
    low, high = (" x ".join(f"{value:g}" for value in side) for side in values)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def preprocessing_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    """(step, what it does) of every step between a source image and the network, in words."""
    p: PreprocessConfig = spec.preprocess
    rows = [("Values", "Hounsfield units (rescaled values)" if p.units == "hu" else "stored values")]
    if p.crop != "none":
        what = "the body (above -500 HU)" if p.crop == "body" else "the foreground (not 0)"
        rows.append(("Crop", f"to {what}, with {p.crop_margin_mm:g} mm around it"))
    spacing = "each image keeps its own spacing"
    if p.spacing:
        spacing = f"to {' x '.join(f'{side:g}' for side in p.spacing)} mm (D, H, W), linear"
    rows.append(("Resampling", spacing))
    intensity = {
        "window": f"{p.window[0]:g} to {p.window[1]:g} become 0 to 1, values outside are cut off",
        "percentile": f"quantiles {p.percentiles[0]:g} to {p.percentiles[1]:g} of the foreground become 0 to 1",
        "zscore": f"mean +- {p.zscore_range:g} standard deviations become 0 to 1",
        "none": "as they are",
        "auto": "window for CT, quantiles of the foreground otherwise",
    }[p.intensity]
    rows.append(("Intensity", intensity))
    if p.projection != "none":
        what = {"mip": "maximum intensity", "mean": "mean"}[p.projection]
        rows.append(("Projection", f"{what} over the depth from {p.projection_slab[0]:g} to {p.projection_slab[1]:g} of it"))
    patch = " x ".join(map(str, spec.patch))
    rows.append(("Input", f"patches of {patch} voxels (D, H, W), {_count(spec.channels, 'channel')}, float32"))
    return [*rows, ("Output", f"probability of {_listed(spec.classes)}")]


def _training(card: Card) -> list[Block]:
    facts = card.training
    network = dict(facts["network"])
    name = network.pop("name", card.spec.model.name)
    settings = ", ".join(f"{key} {value}" for key, value in network.items())
    return [
        Block(
            "facts",
            rows=[
                ("Network", name + (f" ({settings})" if settings else "")),
                ("Parameters", "-" if card.reference.parameters is None else f"{card.reference.parameters:,}"),
                ("Optimizer", f"{facts['optimizer']}, learning rate {facts['learning_rate']:g}, loss {facts['loss']}"),
                ("Duration", f"{_count(facts['epochs'], 'epoch')}, batches of {facts['batch_size']}, seed {facts['seed']}"),
                ("Augmentation", "yes" if facts["augmentation"] else "none"),
            ],
        )
    ]


_STEPS = {
    "freeze_norms": "Norms take the statistics of {patches} training patches and go into the convolutions before them.",
    "filters": "{remove:.0%} of the {measure} leave as whole filters, the least important ones by a first-order estimate on "
    "{patches} training patches.",
    "weights": "The smallest weights become zeros, {sparsity:.0%} of them; sensitive layers keep more.",
    "cluster": "The weights of a layer share {clusters} values.",
    "quantize": "Weights and activations are rounded as in 8-bit integers, in ranges measured on {patches} training patches.",
}


_MEASURES = {
    "parameters": "parameters", "macs": "multiply-accumulates", "both": "parameters and of the multiply-accumulates",
}  # fmt: skip


def describe_step(step: Mapping[str, Any]) -> str:
    """A step of a recipe as sentences; unknown ones with their settings."""
    name = str(step["do"])
    rest = {key: value for key, value in step.items() if key not in ("do", "outcome")}
    try:
        text = _STEPS[name].format(**rest | {"measure": _MEASURES.get(str(rest.get("measure")), "")})
        if name == "weights" and rest.get("pattern"):
            m, n = rest["pattern"]
            text = f"The smallest weights become zeros: {m} in every {n} neighbouring input channels."
    except (KeyError, ValueError):
        text = ": ".join(filter(None, [name, ", ".join(f"{key} {value}" for key, value in rest.items())])) + "."
        return " ".join(filter(None, [text, step.get("outcome")]))
    if rest.get("epochs"):
        text += f" Then trained on for {_count(rest['epochs'], 'epoch')}"
        text += f", in {rest['rounds']} rounds of both." if rest.get("rounds", 1) > 1 else "."
    return " ".join(filter(None, [text, step.get("outcome")]))


def _compression(card: Card) -> list[Block]:
    if not card.steps:
        return [Block("text", text="The network was not changed; only its formats differ.")]
    return [Block("list", items=[describe_step(step) for step in card.steps])]


def _parity(card: Card) -> list[Block]:
    if not card.parity:
        return [Block("text", text="No export was compared.")]
    rows = [
        (
            name,
            f"{found['max_abs_difference']:.1e}",
            f"{found['same_answer']:.4%}",
            f"{found['patches']} ({'real' if found['inputs'] == 'dataset' else 'noise'})",
        )
        for name, found in card.parity.items()
    ]
    text = "Each export was opened again and compared with the trained network that it was made of, patch by patch."
    return [
        Block("text", text=text),
        Block("table", head=("format", "largest difference of a probability", "same class", "patches"), rows=rows),
    ]


def _commands(card: Card) -> list[Block]:
    blocks = []
    for what, command in card.commands:
        blocks += [Block("text", text=what), Block("code", text=command)]
    return blocks or [Block("text", text="See hvd-imaging predict --help.")]


def _versions(card: Card) -> list[Block]:
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items() if version)
    facts = [("Versions", versions or "-"), ("Card made", card.created)]
    rows = [(name, digest) for name, digest in card.files.items()]
    return [
        Block("facts", rows=facts),
        *([Block("table", head=("file", "SHA-256"), rows=rows)] if rows else []),
    ]


def _modalities(card: Card) -> str:
    known = [name for name in card.data["modalities"] if name != "unknown"]
    return _listed(known) if known else "medical"


def _listed(names: Sequence[str], word: str = "and") -> str:
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


# --- pictures -------------------------------------------------------------------------------------------------------


def pictures(card: Card) -> list[dict[str, str]]:
    """The card's pictures as {"caption", "png"} (base64): differences with intervals, and overlays."""
    from . import plots

    found = []
    with tempfile.TemporaryDirectory() as folder:
        name = gate.PRIMARY[card.spec.task]
        changes = [(one.format, one.differences[name]) for one in card.candidates if name in one.differences]
        known = [(label, c.value, c.interval) for label, c in changes if c.value is not None]
        if known:
            path = plots.draw_differences(Path(folder) / "differences.png", known, gate.NAMES[name], card.limits.metric_loss)
            caption = f"{gate.NAMES[name]} against the float model on the {card.split} split: point and 95% interval."
            if card.limits.metric_loss is not None:
                caption += " Dashed: the limit for the point."
            found.append((caption, path))
        if card.overlays:
            # Numbers, not pseudonyms: a card goes further than the data set.
            numbered = [replace(overlay, id=str(number + 1)) for number, overlay in enumerate(card.overlays)]
            path = plots.overlay_sheet(numbered, card.spec.classes, card.spec.task, Path(folder) / "overlays.png")
            caption = (
                f"Worst and best cases of the {card.split} split by {card.pictured or 'the model'}. The pictures are slices of "
                "cases of the data set: who may not see those may not see this page."
            )
            found.append((caption, path))
        return [
            {"caption": caption, "png": base64.b64encode(path.read_bytes()).decode("ascii")} for caption, path in found
        ]


# --- writers --------------------------------------------------------------------------------------------------------


def to_json(card: Card) -> dict[str, Any]:
    """The card for programs; pictures are left out."""
    return {
        "schema": SCHEMA,
        "name": card.spec.run,
        "created": card.created,
        "summary": summary(card),
        "model": card.spec.model_dump(mode="json"),
        "medical_device": False,
        "intended_use": card.intended_use,
        "limitations": limitations(card),
        "data": dict(card.data),
        "training": dict(card.training),
        "compression": [dict(step) for step in card.steps],
        "split": card.split,
        "reference": card.reference.to_json(),
        "latency_of": card.latency_of,
        "formats": [
            {
                **one.to_json(),
                "released": not card.judged[one.format],
                "missed": list(card.judged[one.format]),
                "parity": card.parity.get(one.format),
            }
            for one in card.candidates
        ],
        "limits": card.limits.model_dump(mode="json"),
        "machine": dict(card.machine),
        "measured": dict(card.measured),
        "commands": [{"what": what, "command": command} for what, command in card.commands],
        "versions": dict(card.versions),
        "files": dict(card.files),
    }


def markdown(card: Card, parts: Sequence[Part]) -> str:
    """The card as Markdown (GitHub's tables). Names from outside cannot make markup of their own."""
    lines = [f"# {_md(title(card))}", "", _md(summary(card)), ""]
    lines += ["**Not a medical device. Not for decisions about patients.**", ""]
    for part in parts:
        lines += [f"## {part.heading}", ""]
        for block in part.blocks:
            if block.caption:
                lines += [f"{_md(block.caption)}:", ""]
            if block.kind == "text":
                lines += [_md(block.text), ""]
            elif block.kind == "list":
                lines += [*(f"- {_md(item)}" for item in block.items), ""]
            elif block.kind == "code":
                lines += [*(f"    {line}" for line in block.text.splitlines()), ""]
            elif block.kind == "facts":
                lines += [*(f"- **{_md(name)}:** {_md(value)}" for name, value in block.rows), ""]
            else:
                lines += [_md_row(block.head), "|" + "---|" * len(block.head), *map(_md_row, block.rows), ""]
    if card.overlays:
        lines += [f"Pictures of the worst and best cases are in {HTML}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _md(text: str) -> str:
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(str(text).split())), quote=False)


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_md(cell) for cell in cells) + " |"
