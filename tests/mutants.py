"""Do the tests notice a bug? Each mutant is the product with one line made wrong.

    python tests/mutants.py                 the fast tier against all mutants: all but 5 must die
    python tests/mutants.py --all           all tests: every mutant must die
    python tests/mutants.py 3 17            these mutants
    python tests/mutants.py --hinted-only   stop after the tests that are likely to notice
    python tests/mutants.py --list          what the mutants are; runs nothing

Each mutant is made in a copy of the project. The tests that are likely to notice it (its hints)
run first; the rest of the tier runs only if they pass.
"""

import argparse
import contextlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gpt2_flax"
MOST_SURVIVORS = {"fast": 5, "all": 0}
COMPILED = ".pytest_cache/d/compiled"  # where tests/conftest.py keeps compiled programs
SECONDS = 3600  # for one call of pytest: a mutant may hang


class Mutant(NamedTuple):
    """what: the bug, in a few words.

    right: a part of the package's text that occurs once. wrong: what takes its place.
    hints: arguments of pytest, several calls parted by ";".
    """

    what: str
    right: str
    wrong: str
    hints: str


MUTANTS = [
    # The model
    Mutant(
        "a position attends to the next one",
        "positions_T[None, None, :, None] >= positions_K[None, None, None, :]",
        "positions_T[None, None, :, None] + 1 >= positions_K[None, None, None, :]",
        "tests/model/test_gpt2.py",
    ),
    Mutant(
        "the cache's position does not advance",
        "index.value = start + k.shape[1]",
        "index.value = start",
        "tests/model/test_gpt2.py -k cache; tests/generation/test_generation.py",
    ),
    Mutant(
        "decoding attends to padding",
        "if allowed_BxHx1xK is not None:",
        "if False:",
        "tests/model/test_gpt2.py -k cached_steps; tests/generation/test_generation.py -k padded",
    ),
    Mutant(
        "kernels that end a residual branch are not drawn smaller",
        "(math.sqrt(2 * config.n_layer) if residual else 1.0)",
        "1.0",
        "tests/model/test_gpt2.py -k 'init or drawn or std'; tests/model/test_initialization.py",
    ),
    Mutant(
        "LayerNorm's gradient leaves out the mean",
        "dnormed = dx - dx.mean(-1, keepdims=True) - normed *",
        "dnormed = dx - normed *",
        "tests/model/test_gpt2.py; tests/training/test_step.py -k adamw",
    ),
    Mutant(
        "the LayerNorm kernel drops the gradient of the residual branch",
        "dx_RxP = dx_RxP * inverse_std_R[:, None] + dkept_RxP",
        "dx_RxP = dx_RxP * inverse_std_R[:, None]",
        "tests/model/ops/test_kernels.py -k gradient",
    ),
    Mutant(
        "ids that only pad the vocabulary have a probability",
        "if n_ids == head_WxD.shape[0]:",
        "if True:",
        "tests/model/ops/test_cross_entropy.py; tests/training/test_step.py -k vocabulary",
    ),
    Mutant(
        "positions that do not count are in the loss",
        "return jnp.where(counts_Bxt, loss_Bxt, 0.0).sum(), log_sums_Bxtx1",
        "return loss_Bxt.sum(), log_sums_Bxtx1",
        "tests/model/ops/test_cross_entropy.py; tests/training/test_step.py -k padding",
    ),
    # One step
    Mutant(
        "dropout is the same in every step",
        "jax.random.fold_in(jax.random.key(seed), state.step)",
        "jax.random.key(seed)",
        "tests/training/test_step.py -k dropout",
    ),
    Mutant(
        "every row has the same dropout",
        "jax.random.bits(jax.random.fold_in(key, row), (n_masks, 2), jnp.uint32)",
        "jax.random.bits(key, (n_masks, 2), jnp.uint32)",
        "tests/model/ops/test_dropout.py",
    ),
    Mutant(
        "only the last micro-batch's gradient is used",
        "return jax.tree.map(jnp.add, sums, (loss, tokens, grads)), None",
        "return (loss, tokens, grads), None",
        "tests/training/test_step.py -k accumulate",
    ),
    Mutant(
        "pmap's devices do not add up their gradients",
        "loss, tokens, grads = sums if axis_name is None else jax.lax.psum(sums, axis_name)",
        "loss, tokens, grads = sums",
        "tests/training/test_step.py -k devices",
    ),
    Mutant(
        "a step whose loss is not finite updates the model",
        "is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)",
        "is_finite = jnp.bool_(True)",
        "tests/training/test_step.py -k finite",
    ),
    Mutant(
        "fsdp does not add up the gradients of what is not sharded",
        "x if any(spec) else jax.lax.psum(x, axis_name)",
        "x",
        "tests/distributed/test_fsdp.py -k losses",
    ),
    Mutant(
        "copies of the model that differ go unnoticed",
        "if len(values) == 1:",
        "if True:",
        "tests/training/test_step.py -k 'copy or copies'; tests/faults/test_endings.py -k flipped",
    ),
    Mutant(
        "an error of the thread that makes batches ends the run as if the text had ended",
        "                raise error",
        "                return",
        "tests/training/test_step.py -k error",
    ),
    # Optimizer
    Mutant(
        "biases decay and matrices do not",
        "leaf.ndim >= 2",
        "leaf.ndim < 2",
        "tests/training/test_optim.py",
    ),
    Mutant(
        "clipping makes small gradients larger",
        "jnp.minimum(1.0, largest / optax.tree.norm(updates))",
        "largest / optax.tree.norm(updates)",
        "tests/training/test_optim.py",
    ),
    # Data
    Mutant(
        "a resumed run repeats a row",
        'slots, size), rows[real], {"rows": first})',
        'slots, size), rows[real], {"rows": first - 1})',
        "tests/data/test_batches.py",
    ),
    Mutant(
        "a resumed stream begins its window again",
        '"used": n_rows - len(waiting)}',
        '"used": 0}',
        "tests/data/test_batches.py",
    ),
    Mutant(
        "every epoch has the same order",
        "(self.seed, int(number)))",
        "(self.seed, 0))",
        "tests/data/test_batches.py",
    ),
    Mutant(
        "the end of a document is lost",
        "if piece.ends_document and add_eos:",
        "if False:",
        "tests/data/test_token_files.py tests/data/test_batches.py",
    ),
    Mutant(
        "a damaged token file is used",
        'whole = file_digest(path) == about["fingerprint"]',
        "whole = True",
        "tests/data/test_token_files.py",
    ),
    Mutant(
        "the held-out text begins inside a character",
        r'rb".?[\x80-\xbf]*"',
        r'rb".?"',
        "tests/data/test_sources.py",
    ),
    Mutant(
        "a text is cut inside a token",
        "inside &= self.apart[utf8[starts - 1], utf8[starts]]",
        "pass",
        "tests/data/test_chunking.py",
    ),
    Mutant(
        "articles of WikiText are not parted",
        "yield *pending, not rows_are_lines or is_heading(text)",
        "yield *pending, not rows_are_lines",
        "tests/data/test_hub_datasets.py",
    ),
    Mutant(
        "a tokenizer with gaps in its ids has too small a vocabulary",
        "self.vocab_size: int = 1 + max(vocabulary.values())",
        "self.vocab_size: int = len(vocabulary)",
        "tests/data/test_tokenizers.py",
    ),
    # Checkpoints and the run's directory
    Mutant(
        "a checkpoint whose files were changed is restored",
        "if now[name] != files[name]:",
        "if False:",
        "tests/training/test_checkpoint.py tests/faults/test_damage.py -k 'damage or warning'",
    ),
    Mutant(
        "the worst checkpoint is kept and not the best",
        "return -metrics[METRIC]",
        "return metrics[METRIC]",
        "tests/training/test_checkpoint.py",
    ),
    Mutant(
        "a run goes on with other settings",
        "    if differing:\n        listed",
        "    if False:\n        listed",
        "tests/training/test_train.py -k settings",
    ),
    Mutant(
        "a run goes on with another text",
        'if meta["data"][what] != fingerprint:',
        "if False:",
        "tests/training/test_train.py -k text",
    ),
    Mutant(
        "two trainers use one directory",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n        except OSError",
        "pass\n        except OSError",
        "tests/training/test_train.py -k settings",
    ),
    Mutant(
        "a signal does not stop the run",
        "self.asked = self.signal\n",
        "self.asked = None\n",
        "tests/training/test_train.py -k stop",
    ),
    Mutant(
        "processes that have nothing in common train together",
        "if other[name] != value:",
        "if False:",
        "tests/distributed/test_processes.py -k 'first or refused'",
    ),
    # What a run shows
    Mutant(
        "a resumed run logs some steps twice",
        'if row["step"] <= step',
        "if True",
        "tests/reporting/test_metrics.py",
    ),
    Mutant(
        "the logged loss is a mean of means",
        "sum(entry[1] for entry in good) / count_tokens(good) if good",
        "sum(entry[1] / entry[2] for entry in good) / len(good) if good",
        "tests/reporting/test_metrics.py",
    ),
    Mutant(
        "a new sample takes the place of the earlier ones",
        "self.replace(self.read() | {step: text})",
        "self.replace({step: text})",
        "tests/reporting/test_samples.py -k 'put or people or forgotten'",
    ),
    Mutant(
        "a sample in the report may be markup",
        "<pre>{escape(texts[final])}</pre>",
        "<pre>{texts[final]}</pre>",
        "tests/reporting/test_report.py",
    ),
    # Settings and errors
    Mutant(
        "a minute has a second",
        '"minutes": 60,',
        '"minutes": 1,',
        "tests/config/test_train_config.py -k 'words or length or time'",
    ),
    Mutant(
        "a dropout rate of 1 is accepted",
        "(shares, lambda value: 0 <= value < 1,",
        "(shares, lambda value: 0 <= value <= 1,",
        "tests/config/test_train_config.py",
    ),
    Mutant(
        "every error ends with exit code 2",
        "        return error.exit_code",
        "        return 2",
        "tests/test_errors.py -k exit",
    ),
    Mutant(
        "a secret is printed",
        'text = text.replace(value, f"<{secrets[value]}>")',
        "pass",
        "tests/test_errors.py -k secret; tests/faults/test_secrets.py",
    ),
    # Files of models
    Mutant(
        "square kernels are not transposed",
        'return leaf.T if path[-1] == "kernel" else leaf',
        'return leaf.T if path[-1] == "kernel" and leaf.shape[0] != leaf.shape[1] else leaf',
        "tests/pretrained/test_weight_files.py tests/pretrained/test_modeling.py",
    ),
    Mutant(
        "the eleventh chunk of an array comes before the third",
        "return tuple(numbered[key] for key in keys)",
        "return tuple(numbered[key] for key in sorted(keys))",
        "tests/pretrained/test_weight_files.py -k chunks",
    ),
    Mutant(
        "a model is converted without the weights that its files lack",
        "if fit.missing:",
        "if False:",
        "tests/pretrained/test_convert.py -k missing",
    ),
    # Generation and evaluation
    Mutant(
        "a beam's score is not divided by its length",
        "scores_BxN = scores_BxN / jnp.float32(length) ** length_penalty",
        "scores_BxN = scores_BxN * 1.0",
        "tests/generation/test_generation.py -k beam",
    ),
    Mutant(
        "a text goes on after its end",
        "return ids_RxL, done_R | _is_end(new_R, plan.eos_ids), new_R, prng_key",
        "return ids_RxL, done_R, new_R, prng_key",
        "tests/generation/test_generation.py -k 'greedy or ended'",
    ),
    Mutant(
        "top-k keeps one id too many",
        "jax.lax.top_k(scores, min(self.top_k, scores.shape[-1]))",
        "jax.lax.top_k(scores, min(self.top_k + 1, scores.shape[-1]))",
        "tests/generation/test_logits_processors.py",
    ),
    Mutant(
        "an evaluation is a mean of its batches' means",
        "return total / targets, targets",
        "return math.fsum(float(a) / int(b) for a, b in sums) / len(sums), targets",
        "tests/evaluation/test_evaluate.py -k mean",
    ),
    Mutant(
        "HellaSwag's acc_norm is a token and not a character",
        '"choice_norm": logprobs / np.array(row["characters"]),',
        '"choice_norm": logprobs / np.array(row["tokens"]),',
        "tests/evaluation/test_evaluate.py -k hellaswag",
    ),
    # The rest
    Mutant(
        "a batch that does not fit into memory is chosen",
        "while best > allowed[0] and bytes_of(best) > limit:",
        "while False:",
        "tests/distributed/test_memory.py -k batch; tests/training/test_train.py -k batch_size",
    ),
    Mutant(
        "the hub is asked although local_files_only forbids it",
        "if self._local_files_only:",
        "if False:",
        "tests/pretrained/test_repository.py",
    ),
    Mutant(
        "a trace ends one step late",
        "return self.active and step >= self.last",
        "return self.active and step > self.last",
        "tests/reporting/test_profiling.py",
    ),
    Mutant(
        "the benchmark's MFU is of one device",
        "peak and n_devices * peak)",
        "peak)",
        "tests/evaluation/test_benchmark.py -k mfu",
    ),
]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("numbers", type=int, nargs="*", help="only these mutants")
    parser.add_argument("--all", action="store_true", help="every test, not the fast tier alone")
    parser.add_argument("--hinted-only", action="store_true", help="only the likely tests")
    parser.add_argument("--check-clean", action="store_true", help="first, the tests must pass")
    parser.add_argument("--list", action="store_true", help="name the mutants")
    options = parser.parse_args(argv)
    chosen = options.numbers or range(1, len(MUTANTS) + 1)
    for number in chosen:
        line = row(number)  # for all mutants, before any is run
        if options.list:
            print(line)
    if options.list:
        return 0
    n_killed = 0
    with tempfile.TemporaryDirectory() as folder:
        project = pathlib.Path(folder, "project")
        copy_project(project)
        if options.check_clean:
            check_clean(project, [MUTANTS[number - 1] for number in chosen], options)
        for number in chosen:
            mutant, line, began = MUTANTS[number - 1], row(number), time.monotonic()
            with planted(project, mutant):
                killer = find_killer(project, mutant, options)
            n_killed += killer is not None
            verdict = f"killed by {killer}" if killer else "SURVIVED"
            print(f"{line} | {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    tier = "all" if options.all else "fast"
    print(f"{tier} tier: {n_killed} of {len(chosen)} killed")
    return int(len(chosen) - n_killed > MOST_SURVIVORS[tier])


def row(number: int) -> str:
    mutant = MUTANTS[number - 1]
    return f"{number:2} | {file_of(mutant, PACKAGE).relative_to(PACKAGE)} | {mutant.what}"


def file_of(mutant: Mutant, package: pathlib.Path) -> pathlib.Path:
    """The file that a mutant changes. Raises SystemExit unless its line is there exactly once."""
    counts = {path: path.read_text("utf-8").count(mutant.right) for path in package.rglob("*.py")}
    if sum(counts.values()) != 1:
        sys.exit(
            f"mutant '{mutant.what}': the package has this {sum(counts.values())} times, not"
            f" once: {mutant.right}\n  mend the table in {__file__}"
        )
    return max(counts, key=counts.get)


def check_clean(project: pathlib.Path, mutants: list[Mutant], options) -> None:
    """Raise SystemExit where a test fails without any mutant."""
    for mutant in mutants:
        killer = find_killer(project, mutant, options)
        if killer is not None:
            sys.exit(f"{killer} fails without a mutant")
        if not options.hinted_only:
            return  # that was the whole tier


def copy_project(project: pathlib.Path) -> None:
    """Copy what the tests need, and share the compiled programs that they keep."""
    ignored = shutil.ignore_patterns("__pycache__", ".git", ".*_cache", "model_output")
    shutil.copytree(ROOT, project, ignore=ignored)
    for root in (ROOT, project):
        (root / COMPILED).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / COMPILED).mkdir(exist_ok=True)
    (project / COMPILED).symlink_to(ROOT / COMPILED)


@contextlib.contextmanager
def planted(project: pathlib.Path, mutant: Mutant):
    """Context in which the copy has a mutant's bug."""
    path = file_of(mutant, project / PACKAGE.name)
    sound = path.read_text("utf-8")
    path.write_text(sound.replace(mutant.right, mutant.wrong), "utf-8")
    try:
        yield
    finally:
        path.write_text(sound, "utf-8")


def find_killer(project: pathlib.Path, mutant: Mutant, options) -> str | None:
    """The first test that fails; None where none does."""
    killer = run_hints(project, mutant.hints, options)
    if killer is None and not options.hinted_only:
        killer = run(project, ["-n", "auto"], options)
    return killer


def run_hints(project: pathlib.Path, hints: str, options) -> str | None:
    for hint in map(shlex.split, hints.split(";")):
        # Of a file that was moved only the words are left.
        known = [word for word in hint if "/" not in word or (project / word).exists()]
        if known and (killer := run(project, known, options)):
            return killer
    return None


def run(project: pathlib.Path, arguments: list[str], options) -> str | None:
    """Run pytest up to the first failure. Returns the test that failed; None for none."""
    tier = ["--all"] if options.all else []
    # The package is imported from the copy, wherever it may be installed.
    environment = os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", *arguments, *tier],
            cwd=project, env=environment, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"a limit of {SECONDS} s"
    if done.returncode in (0, 5):  # 5: the hint names no test of this tier
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if found is None and done.returncode not in (1, 2):
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}")
    return found[1] if found else f"pytest's exit code {done.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
