"""Recipes: everything that decides a training run, in one typed YAML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zamba2.errors import Zamba2Error
from zamba2.language.messages import brief

__all__ = ["RECIPES", "Lora", "Recipe", "read_recipe"]

RECIPES = Path(__file__).parent / "recipes"
LONGEST = 1_000_000  # bytes of a recipe; ours have one thousand
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """Unknown fields and loose types are errors; defaults are checked too."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class Lora(Strict):
    """Low-rank adapters in the place of full fine-tuning (peft)."""

    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Share = 0.0
    targets: tuple[str, ...] = Field(
        ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "linear"), min_length=1
    )


class Recipe(Strict):
    """A training run. The field's names are those of the YAML file and of ``KEY=VALUE`` on the command line."""

    stage: Literal["sft", "dpo"] = Field(description="sft: next tokens of conversations or texts; dpo: preferences")
    model: str = Field(description="alias, Hub id or folder; a config.json starts from new random weights")
    tokenizer: str | None = Field(None, description="whose tokenizer; by default the model's")
    out: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, lt=2**32)  # as NumPy has it

    data: tuple[str, ...] = Field(min_length=1, description="NAME[:PATH][=WEIGHT], as for zamba2 train preview")
    until: Literal["first", "all"] = Field("first", description="stop with the first set read to its end, or read all of them once")
    examples: Count | None = Field(None, description="most examples to draw from the mixture; all if not given")
    held_out: int = Field(0, ge=0, description="the first examples drawn, kept for evaluation")
    against: tuple[Path, ...] = Field((), description="prompts of these evaluations are dropped")
    language: str | None = "en"
    ties: bool = False
    max_tokens: Count = Field(4096, description="longest example; with packing, the length of a row")
    packing: bool = Field(True, description="sft: several examples in one row, kept apart by seq_idx")

    epochs: Positive = 1.0
    steps: Count | None = Field(None, description="optimizer steps, in the place of epochs")
    batch_size: Count = Field(8, description="rows, or pairs, of one optimizer step over all devices")
    device_batch_size: Count = Field(1, description="of these, how many at once on one device")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for the matrices inside the model, beside AdamW for the rest")
    learning_rate: Positive = 2e-5
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
    beta: Positive = Field(0.1, description="dpo: how strongly the model is held to the reference")
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = Field("sigmoid", description="dpo")
    sft_weight: float = Field(0.0, ge=0, allow_inf_nan=False, description="dpo: of the chosen answers' cross-entropy, added to the loss")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.0, description="loss robust: share of pairs thought to be swapped")

    precision: Literal["fp32", "bf16", "bf16-mixed"] = Field("bf16-mixed", description="weights / products: fp32, bf16, or fp32 / bf16")
    rounding: Literal["none", "q8", "q4"] = Field(
        "none", description="every second step through weights rounded as this format packs them, so that a packed model loses less"
    )
    distill: bool = Field(
        False, description="sft, with rounding: imitate the model as it was, in place of the data's own words, with every step rounded; "
        "the result is for that format alone",
    )  # fmt: skip
    checkpointing: bool = Field(False, description="compute activations again in the backward pass: less memory, more time")
    compile: bool = Field(False, description="torch.compile: minutes before the first step, for faster ones")
    graph: bool = Field(False, description="sft with packing, on one GPU: a step's passes as one CUDA graph, which saves launching kernels")
    device: str | None = Field(None, description="cpu, cuda, mps; by default a GPU if there is one")
    lora: Lora | None = Field(None, description="train adapters; without, all weights are trained")

    pack: tuple[Literal["bf16", "q8", "q4"], ...] = Field((), description="also write the result in these formats of the native engine")
    push_to: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="Hub repository to upload the result to, as owner/name")
    private: bool = Field(True, description="whether a repository that push_to makes is private")

    log_every: Count = 10
    save_every: Count = Field(500, description="steps between checkpoints")
    keep: Count = Field(2, description="checkpoints to keep")
    evaluate_every: Count | None = Field(None, description="steps between evaluations of what is held out; by default at the end")
    tracker: Literal["none", "tensorboard", "trackio"] = "none"

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.batch_size % self.device_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of device_batch_size {self.device_batch_size}")
        if self.graph and (self.stage != "sft" or not self.packing or self.checkpointing or self.compile or self.rounding != "none"):
            raise ValueError("graph is for stage sft with packing, and without checkpointing, compile and rounding; leave it out")
        if self.rounding != "none" and self.lora is not None:
            raise ValueError("rounding is for training all weights; adapters are never rounded: leave out rounding or lora")
        if self.distill and (self.stage != "sft" or self.rounding == "none"):
            raise ValueError("distill is for stage sft with rounding; set rounding, or leave it out")
        if self.label_smoothing and self.loss != "robust":
            raise ValueError(f"label_smoothing is for loss robust, and has no effect on {self.loss}; set loss, or leave it out")
        if self.stage == "dpo" and self.lora is not None and self.lora.dropout:
            raise ValueError("lora.dropout is for stage sft; pairs are trained without dropout: leave it out")
        if self.evaluate_every is not None and not self.held_out:
            raise ValueError("evaluate_every needs examples to evaluate on; set held_out")
        return self

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False, allow_unicode=True)
        return text


def read_recipe(source: str | Path, changes: Sequence[str] = (), *, stage: str | None = None) -> Recipe:
    """A recipe file, or one of ours by name, with ``KEY=VALUE`` changes applied (YAML values; ``lora.rank=8`` reaches inside).

    Relative paths in it are relative to the current folder. Raises Zamba2Error that names the field.
    """
    path = RECIPES / f"{source}.yaml" if (RECIPES / f"{source}.yaml").is_file() else Path(source)
    if not path.is_file():
        ours = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise Zamba2Error(f"there is no recipe {str(source)!r}; give a YAML file, or one of {ours}.")
    if path.stat().st_size > LONGEST:
        raise Zamba2Error(f"{path} has {path.stat().st_size} bytes; a recipe of at most {LONGEST} is needed.")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise Zamba2Error(f"{path} is not YAML ({brief(error)}); a list of `field: value` lines is needed.") from None
    if not isinstance(fields, dict):
        raise Zamba2Error(f"{path} holds a {type(fields).__name__}; a list of `field: value` lines is needed.")
    for change in changes:
        _apply(fields, change)
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        raise Zamba2Error(f"{path}: {_reason(error)}") from None
    if stage is not None and recipe.stage != stage:
        raise Zamba2Error(f"{path} is a recipe for {recipe.stage}; run `zamba2 train {recipe.stage} {source}`.")
    return recipe


def _apply(fields: dict[Any, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise Zamba2Error(f"{change!r} is no change to a recipe; KEY=VALUE is needed, as in learning_rate=1e-5.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise Zamba2Error(f"the value of {change!r} is not YAML; quote it.") from None
    *outer, last = key.split(".")
    inside = fields
    for name in outer:
        if not isinstance(inside.get(name), dict):
            inside[name] = {}
        inside = inside[name]
    inside[last] = value


def _reason(error: ValidationError) -> str:
    """The first problem as one sentence."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        owner: Mapping[str, Any] = Lora.model_fields if place.startswith("lora.") else Recipe.model_fields
        return f"there is no field {place}; there are {', '.join(owner)}."
    if problem["type"] == "missing":
        return f"the field {place} is missing."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place} is {brief(problem['input'])}: {message[:1].lower()}{message[1:]}." if place else f"{message}."
