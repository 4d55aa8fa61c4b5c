"""A training run: a recipe, trl's trainer around our model, and a folder that holds all that is needed to repeat it.

    recipe.yaml       the recipe with every field          data.json    what was read, kept and dropped, by set
    versions.json     of the libraries, and the machine    metrics.jsonl, loss.png, loss.svg    while and after training
    checkpoint-N/     to resume from                       model/       the result, in the Hub's layout (adapter/ for LoRA alone)
"""

# trl, peft and transformers are typed in parts.
# mypy: disable-error-code="misc, no-untyped-call, no-any-return"

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import AutoTokenizer, TrainerCallback, Zamba2Config
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from zamba2 import __version__
from zamba2.config import Config
from zamba2.errors import Zamba2Error, notice
from zamba2.hf import Zamba2ForCausalLM
from zamba2.language.messages import brief
from zamba2.language.tokenizer import Tokenizer
from zamba2.runtime.processors import versions
from zamba2.runtime.torch import device_of, multiplies_bf16
from zamba2.train.adapters import add_lora, coverage, kept_by_merging
from zamba2.train.card import model_card
from zamba2.train.graph import GraphedStep
from zamba2.train.muon import Muon
from zamba2.train.packing import IGNORED, collate_packed
from zamba2.train.prepare import Prepared, prepare
from zamba2.train.progress import Progress
from zamba2.train.recipe import Recipe
from zamba2.train.rounding import RoundWeights, divergence
from zamba2.weights.files import replacing, write_text
from zamba2.weights.formats import format_named
from zamba2.weights.hub import resolve, upload
from zamba2.weights.packed import Packing, is_packed, quantize

__all__ = ["checkpoints", "make_trainer", "run"]

COMPLETE = "complete"  # written into a checkpoint when all of it is on disk
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")
STILL_STEPS = 20  # optimizer steps behind the warm-up over which a DPO loss must leave ln 2 ...
STILL = 1e-3  # ... by more than this on average
SLOW_MIXED = "precision: fp32 in place of bf16-mixed: this CPU has no instructions for products of bf16, which take several times as long"
LEFT = 0.9  # of what adapters learned; when merging keeps less, it is said
COMPILES = "compile: the model is compiled before the first step; that takes minutes, on a CPU about one for each two layers"
SLOW_BF16 = "precision is bf16, and this CPU has no instructions for its products: fp32's are several times as fast, in twice the memory"


def run(recipe: Recipe, *, resume: bool = False, progress: Progress | None = None) -> Path:
    """Train as the recipe says. Returns the folder of the resulting model. Raises Zamba2Error.

    resume: go on from the last complete checkpoint of ``recipe.out``, on the trajectory an uninterrupted run would have had.
    """
    processes = PartialState(cpu=device_of(recipe.device).type == "cpu")  # one, unless torchrun or accelerate started more
    progress = progress or Progress(quiet=not processes.is_main_process)
    recipe = for_this_machine(recipe, progress)
    if recipe.compile:
        progress.say(COMPILES)
    with processes.main_process_first():
        _check_folder(recipe, resume, others=not processes.is_main_process)
    model, tokenizer, source = load(recipe)
    with processes.main_process_first(), progress.preparing():
        prepared = prepare(recipe, Tokenizer.from_folder(source, config=model.model.config), _tokenizer_files(source), progress.prepared)
    if processes.is_main_process:
        _write_facts(recipe, prepared)
    with _sentences(recipe, progress):
        trainer = make_trainer(recipe, model, tokenizer, prepared, progress)  # which for pairs runs the reference
    if recipe.lora is not None:
        progress.coverage(coverage(trainer.model, model.model.config))
    checkpoint = checkpoints(recipe.out)[-1] if resume else None
    if checkpoint is not None:
        state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._total_train_tokens = state.num_input_tokens_seen
    with _sentences(recipe, progress), progress:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.verify_finite()
        if prepared.held_out is not None and recipe.evaluate_every is None:  # else the trainer has evaluated the last step
            trainer.evaluate()
        folder = export(recipe, trainer, source)
    if processes.is_main_process:
        progress.plot(recipe.out)
        finish(recipe, prepared.report, folder)
    processes.wait_for_everyone()
    return folder


def finish(recipe: Recipe, report: Mapping[str, Any], folder: Path) -> None:
    """The result's card, its packed copies, and its way to the Hub. Raises Zamba2Error."""
    write_text(folder / "README.md", model_card(recipe, report, _versions(), recipe.out / "metrics.jsonl"))
    for name in recipe.pack:
        target = recipe.out / f"model-{name}"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier end of this run
        quantize(folder, target, format_named(name))
    if recipe.push_to is not None:
        notice(f"uploaded to {upload(folder, recipe.push_to, private=recipe.private)}")


def for_this_machine(recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe, in fp32 where it is in bf16-mixed for a CPU without instructions for products of bf16: PyTorch's way around them takes
    several times as long (docs/log.md), and fp32 loses nothing. bf16 stays, since fp32 takes twice the memory. Says either."""
    if recipe.precision == "fp32" or multiplies_bf16(device_of(recipe.device)):
        return recipe
    if recipe.precision == "bf16":
        progress.say(SLOW_BF16)
        return recipe
    progress.say(SLOW_MIXED)
    return recipe.model_copy(update={"precision": "fp32"})


def load(recipe: Recipe) -> tuple[Zamba2ForCausalLM, Any, Path]:
    """The recipe's model in training mode, its tokenizer, and the folder the tokenizer's files are in. Raises Zamba2Error."""
    torch.manual_seed(recipe.seed)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    path = Path(recipe.model)
    if path.suffix == ".json":
        model = Zamba2ForCausalLM(Zamba2Config.from_dict(Config.from_file(path).to_dict()))
        if dtype != torch.float32:
            raise Zamba2Error("precision is bf16, but new weights learn nothing in it; use bf16-mixed or fp32.")
        folder = path.parent
    else:
        folder = resolve(recipe.model)
        if is_packed(folder):
            raise Zamba2Error(f"{recipe.model} holds packed weights, which cannot be trained; give the checkpoint that they were made of.")
        model = Zamba2ForCausalLM.from_pretrained(str(folder), dtype=dtype)
    source = folder if recipe.tokenizer is None else resolve(recipe.tokenizer, weights=False)
    Tokenizer.from_folder(source, config=model.model.config)  # says what is wrong with it in our own words
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.train(), tokenizer, source


def make_trainer(recipe: Recipe, model: Any, tokenizer: Any, prepared: Prepared, progress: Progress) -> Any:
    """trl's trainer for the recipe's stage. model: a Zamba2ForCausalLM; with ``recipe.lora``, adapters are added to it."""
    spread = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if spread:
        _check_spread(recipe)
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora)
    callbacks: list[TrainerCallback] = [Watch(recipe, progress)]
    if recipe.rounding != "none":
        packing = Packing.named(recipe.rounding)
        callbacks.append(RoundWeights(model, model.model.config, packing, every=1 if recipe.distill else 2))
    device = device_of(recipe.device)
    workers = int(os.environ.get("WORLD_SIZE", 1))
    accumulate, rest = divmod(recipe.batch_size, recipe.device_batch_size * workers)
    if rest or not accumulate:
        raise Zamba2Error(
            f"batch_size is {recipe.batch_size}; a multiple of device_batch_size {recipe.device_batch_size} times the {workers} processes "
            f"is needed."
        )
    shared = _shared_options(recipe, accumulate, device)
    common: dict[str, Any] = {
        "model": model, "processing_class": tokenizer, "train_dataset": prepared.train, "eval_dataset": prepared.held_out,
        "callbacks": callbacks,
    }  # fmt: skip
    if recipe.optimizer == "muon":
        muon = Muon(model.named_parameters(), recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay)
        common["optimizers"] = (muon, None)
    if recipe.stage == "sft":
        options = SFTConfig(**shared, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True})
        collate = partial(collate_packed, size=recipe.max_tokens if recipe.packing else None, padding=tokenizer.pad_token_id)
        teacher = deepcopy(model).eval().requires_grad_(False) if recipe.distill else None  # before a trainer wraps its forward
        trainer: Any = Conversations(args=options, data_collator=collate, **common)
        trainer.teacher = None if teacher is None else teacher.to(trainer.accelerator.device)
        if prepared.held_out is not None:
            trainer.targets = sum(len(row) - 1 - row[1:].count(IGNORED) for row in prepared.held_out["labels"]) / len(prepared.held_out)
        if recipe.graph:
            if workers > 1:
                raise Zamba2Error(f"graph is for one GPU, and {workers} processes were started; use graph=false.")
            trainer.graphed = GraphedStep(trainer.packed_loss, trainer.model.parameters())
    else:
        preferences = DPOConfig(
            **shared, max_length=None, beta=recipe.beta, label_smoothing=recipe.label_smoothing,
            loss_type=[recipe.loss, "sft"] if recipe.sft_weight else [recipe.loss],
            loss_weights=[1.0, recipe.sft_weight] if recipe.sft_weight else None,
            precompute_ref_log_probs=True, precompute_ref_batch_size=recipe.device_batch_size,
        )  # fmt: skip
        if spread and recipe.lora is None:
            common["ref_model"] = deepcopy(model)  # or trl opens the checkpoint with transformers' own class, whose numbers are others
        trainer = Preferences(args=preferences, **common)
        if recipe.lora is not None:  # trl's copy of the untrained adapter; adapters switched off are the same reference
            trainer.model.delete_adapter("ref")
    for callback in (transformers.PrinterCallback, transformers.trainer_callback.ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _check_spread(recipe: Recipe) -> None:
    """Raises Zamba2Error for what FSDP cannot do: each process would turn, or round, the parts of matrices that it holds."""
    if recipe.precision == "bf16" and recipe.lora is None:
        raise Zamba2Error("precision is bf16, where small weights stay fp32, and FSDP wants all of one kind; use precision=bf16-mixed.")
    if recipe.optimizer == "muon":
        raise Zamba2Error("optimizer is muon, which needs whole matrices, and FSDP spreads them; use optimizer=adamw.")
    if recipe.rounding != "none":
        raise Zamba2Error(f"rounding is {recipe.rounding}, which needs whole matrices, and FSDP spreads them; use rounding=none.")


def _shared_options(recipe: Recipe, accumulate: int, device: torch.device) -> dict[str, Any]:
    """What both of trl's configs are given. accumulate: batches of a device in a step."""
    return {
        "output_dir": str(recipe.out), "seed": recipe.seed, "data_seed": recipe.seed,
        "num_train_epochs": recipe.epochs, "max_steps": recipe.steps or -1,
        "per_device_train_batch_size": recipe.device_batch_size, "per_device_eval_batch_size": recipe.device_batch_size,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay, "max_grad_norm": recipe.max_grad_norm,
        "adam_beta1": recipe.betas[0], "adam_beta2": recipe.betas[1],
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule), "warmup_steps": recipe.warmup,
        "bf16": recipe.precision == "bf16-mixed", "use_cpu": device.type == "cpu",
        "activation_checkpointing": recipe.checkpointing, "activation_checkpointing_kwargs": {"use_reentrant": False},
        "torch_compile": recipe.compile,
        "logging_steps": recipe.log_every, "logging_first_step": True, "logging_nan_inf_filter": False,
        "save_steps": recipe.save_every, "save_total_limit": None,  # Watch deletes old ones, when the new one is complete
        "eval_strategy": "no" if recipe.evaluate_every is None else "steps", "eval_steps": recipe.evaluate_every,
        "report_to": [] if recipe.tracker == "none" else [recipe.tracker],
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True, "remove_unused_columns": False, "dataloader_pin_memory": device.type == "cuda",
    }  # fmt: skip


class Watched:
    """Among a trainer's bases: notices a loss or a gradient that is no number before it reaches a checkpoint."""

    finite: Any = None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        good = torch.isfinite(loss).all()
        self.finite = good if self.finite is None else self.finite & good
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers looks for the last step behind a step alone: a run resumed there would make one more."""
        state: Any = self.state  # type: ignore[attr-defined]
        if state.global_step < state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Without what mamba_ssm marks ``_no_weight_decay``: towards 0, A_log would make every state forget alike."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if name.rpartition(".")[2] not in ("A_log", "D")]

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        norm: torch.Tensor = super()._clip_grad_norm(model)
        self.finite = self.finite & torch.isfinite(norm).all()
        return norm

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.verify_finite()
        self.state.num_input_tokens_seen = self._total_train_tokens  # type: ignore[attr-defined]  # which trl would forget
        super()._save_checkpoint(*args, **kwargs)
        # Each process writes its own random state; then Watch calls the checkpoint complete.
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """trl writes one into every checkpoint; the run's folder says more."""

    def verify_finite(self) -> None:
        """Raises Zamba2Error if a loss or a gradient since the last call was NaN or infinite."""
        if self.finite is not None and not bool(self.finite):
            step = self.state.global_step  # type: ignore[attr-defined]
            raise not_finite(step)
        self.finite = None


def not_finite(step: int) -> Zamba2Error:
    return Zamba2Error(
        f"the loss or its gradient is NaN or infinite by step {step}; the last checkpoint is intact: lower learning_rate or check the data."
    )


class Conversations(Watched, SFTTrainer):
    """trl's SFTTrainer on packed rows."""

    graphed: GraphedStep | None = None
    teacher: Any = None  # whom to imitate, in place of the data
    targets = 1.0  # of a held-out row, on average

    def packed_loss(self, input_ids: torch.Tensor, labels: torch.Tensor, seq_idx: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """The loss of packed rows by the model's parts, none of which waits for the device. items: labels of the whole step."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        with self.accelerator.autocast():
            return model.packed_loss(input_ids, labels, seq_idx, items)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The head of our own forward: trl's scores every position, in fp32, and not only those with a label."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.graphed is not None and model.training and num_items_in_batch is not None:
            items = torch.as_tensor(num_items_in_batch, device=inputs["input_ids"].device)
            own = {name: inputs[name] for name in ("input_ids", "labels", "seq_idx")}
            loss = self.graphed(**own, items=items).requires_grad_()  # the gradients are there already: its backward adds nothing
        elif self.teacher is not None and model.training:
            with self.accelerator.autocast():
                loss, count = divergence(model, self.teacher, inputs)
            loss = loss / (count if num_items_in_batch is None else num_items_in_batch)
        else:
            if not model.training:  # batches of an evaluation are averaged by rows; so the whole is the mean over targets
                num_items_in_batch = self.targets * len(inputs["labels"])
            loss = model(**inputs, loss_only=True, num_items_in_batch=num_items_in_batch).loss
        if model.training:
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            # as in trl: the count is of all processes, whose gradients are averaged
            loss = loss if num_items_in_batch is None else loss * self.accelerator.num_processes
        return loss


class Preferences(Watched, DPOTrainer):
    """trl's DPOTrainer on pairs that are tokenized already, where trl would render and cut them its own way."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


class Watch(TrainerCallback):
    """Metrics to a file and the screen; marks complete checkpoints; stops a DPO run in which nothing is trained."""

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        self.recipe, self.progress = recipe, progress
        self.still: list[tuple[int, float]] | None = []  # step and distance of its loss from ln 2; None once it has moved

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.training(state.global_step, state.max_steps, state.num_input_tokens_seen)
        if state.is_world_process_zero:
            self.progress.resume(self.recipe.out, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float))}
        self.progress.log(self.recipe.out, state.global_step, numbers)
        if "loss" in numbers and not math.isfinite(numbers["loss"]):
            raise not_finite(state.global_step)
        if self.recipe.stage == "dpo" and self.recipe.loss == "sigmoid" and not self.recipe.sft_weight and "loss" in numbers:
            self._check_still(state, numbers["loss"])

    def _check_still(self, state: Any, loss: float) -> None:
        warmup = math.ceil(self.recipe.warmup * state.max_steps)
        if self.still is None or state.global_step <= warmup:
            return
        self.still.append((state.global_step, abs(loss - math.log(2))))
        first, last = self.still[0][0], state.global_step
        if last - first < STILL_STEPS:
            return
        if sum(distance for _, distance in self.still) / len(self.still) < STILL:
            raise Zamba2Error(
                f"the DPO loss stands at ln 2 from step {first} to {last}: the model does not move away from its reference. Nothing that "
                f"is trained reaches the output, or learning_rate {self.recipe.learning_rate} is far too small; see the coverage table."
            )
        self.still = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        (self.recipe.out / f"checkpoint-{state.global_step}" / COMPLETE).touch()
        kept = set(checkpoints(self.recipe.out)[-self.recipe.keep :])
        for old in {path for path in self.recipe.out.glob("checkpoint-*") if path.name[11:].isdigit()} - kept:  # not a user's own copies
            (old / COMPLETE).unlink(missing_ok=True)  # first: what is half deleted is none to resume from
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file() and path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def export(recipe: Recipe, trainer: Any, source: Path) -> Path:
    """Write the trained model (with LoRA: merged, and the adapter beside it) in the Hub's layout. Returns its folder.

    Weights that FSDP has spread over processes are gathered; a tied head is written once, as the config says.
    """
    folder = recipe.out / "model"
    model, tensors = trainer.accelerator.unwrap_model(trainer.model), None
    if trainer.is_fsdp_enabled:
        tensors = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        if recipe.lora is not None:
            if tensors is not None:  # spread weights cannot be merged where they lie
                model, trained = add_lora(load(recipe)[0], recipe.lora), tensors
                model.load_state_dict(trained)
                tensors = None
            model.save_pretrained(recipe.out / "adapter")
            if (kept := kept_by_merging(model)) < LEFT:
                what = f"the weights are bf16, whose rounding leaves {kept:.0%} of what the adapters learned in {folder}"
                notice(f"{what}; {recipe.out / 'adapter'} holds all of it, and goes with {recipe.model} as --adapter.", once=False)
            model = model.merge_and_unload()
        model.save_pretrained(folder, state_dict=tensors)
        for file in _tokenizer_files(source):
            with replacing(folder / file.name) as place:
                shutil.copyfile(file, place)
    return folder


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _check_folder(recipe: Recipe, resume: bool, *, others: bool) -> None:
    """Raises Zamba2Error if the run's folder holds another run, or nothing to resume. others: than the main process, which has looked."""
    out, before = recipe.out, recipe.out / "recipe.yaml"
    if recipe.tracker != "none" and find_spec(recipe.tracker) is None:
        raise Zamba2Error(f"tracker is {recipe.tracker}, which is not installed; `pip install {recipe.tracker}`, or set tracker=none.")
    if others:
        return
    if resume:
        if not checkpoints(out):
            raise Zamba2Error(f"{out} holds no complete checkpoint to resume from; leave out --resume.")
        if before.is_file() and before.read_text(encoding="utf-8") != recipe.to_yaml():
            notice(f"the recipe differs from the one in {before}; what follows may leave the first run's trajectory.")
    elif checkpoints(out) or (out / "model").exists():
        raise Zamba2Error(f"{out} holds a run already; give --resume, or another folder with out=FOLDER.")
    out.mkdir(parents=True, exist_ok=True)


def _write_facts(recipe: Recipe, prepared: Prepared) -> None:
    machine = {"python": platform.python_version(), "machine": platform.platform(), "processors": os.cpu_count()}
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for name, text in (
        ("recipe.yaml", recipe.to_yaml()),
        ("data.json", json.dumps(prepared.report, indent=1)),
        ("versions.json", json.dumps(_versions() | machine | {"command": sys.argv, "started": started}, indent=1)),
    ):
        write_text(recipe.out / name, text)


def _versions() -> dict[str, str]:
    return {"zamba2": __version__} | versions(*LIBRARIES)


@contextmanager
def _sentences(recipe: Recipe, progress: Progress) -> Iterator[None]:
    """What goes wrong while training, as one sentence."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoints(recipe.out):
            progress.say(f"{checkpoints(recipe.out)[-1]} is complete; the same command with --resume goes on from there.")
        raise
    except torch.OutOfMemoryError as error:
        what = "lower device_batch_size or max_tokens, or set checkpointing"
        raise Zamba2Error(f"there is not enough memory ({brief(error)}); {what}.") from None
    except (OSError, RuntimeError) as error:
        of_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in ("inline_container", "iostream"))  # torch.save's
        if not of_torch and getattr(error, "errno", None) != errno.ENOSPC:
            raise
        raise Zamba2Error(f"the disk of {recipe.out} is full; free some space, then go on with --resume.") from None
