"""Cached decoding gives what PyTorch's `generate` gives; every setting is obeyed or refused."""

import copy
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig

from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.errors import UserError
from gpt2_flax.generation import decoding, generation, logits_processors
from gpt2_flax.model.outputs import FlaxBeamSearchOutput, FlaxGreedySearchOutput, FlaxSampleOutput
from gpt2_flax.pretrained import weights
from gpt2_flax.pretrained.modeling import FlaxGPT2LMHeadModel, FlaxGPT2Model, param_shapes
from tests.model.test_gpt2 import torch_twin

PAD = 30
LINE_END = ord("\n")


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Compile without optimizing, and one thread for PyTorch: the programs are tiny."""
    ours, threads = decoding.decode_compiled, torch.get_num_threads()
    decoding.decode_compiled = jax.jit(
        decoding.decode,
        static_argnums=(0, 1, 2),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    torch.set_num_threads(1)
    yield ours
    torch.set_num_threads(threads)
    decoding.decode_compiled = ours


@pytest.fixture(scope="module")
def twin(tiny_config):
    """(our model, PyTorch's), one layer, with logits far enough apart for no ties."""
    config = tiny_config(n_positions=17, n_layer=1)
    oracle, params = torch_twin(config)
    params = jax.tree.map(lambda leaf: jnp.asarray(4 * leaf), params)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.mul_(4)
    return FlaxGPT2LMHeadModel(config, params=params), oracle


@pytest.fixture
def model(twin):
    """Ours, with a configuration that a test may change."""
    ours, _ = twin
    return FlaxGPT2LMHeadModel(copy.deepcopy(ours.config), params=ours.params)


@pytest.fixture(scope="module")
def trained():
    """(our model, PyTorch's, 20 prompts of 6 bytes): trained to count, each line up to twelve."""
    counted = "one two three four five six seven eight nine ten eleven twelve"
    words = counted.split()
    starts = np.random.default_rng(0).integers(0, 12, 600)
    text = "".join(" ".join(words[start:]) + "\n" for start in starts)
    data = torch.tensor(list(text.encode()))
    config = transformers.GPT2Config(
        n_layer=2, n_head=3, n_embd=48, n_positions=40, vocab_size=128, eos_token_id=LINE_END,
        bos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    oracle = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=4e-3)
    for _ in range(150):
        starts = torch.randint(len(data) - 40, (16,))
        batch = torch.stack([data[start : start + 40] for start in starts])
        optimizer.zero_grad()
        oracle(batch, labels=batch).loss.backward()
        optimizer.step()
    oracle.eval()
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    ours = FlaxGPT2LMHeadModel(config, params=weights.from_pytorch(state, param_shapes(config)))
    starts = np.random.default_rng(0).integers(0, len(data) - 6, 20)
    return ours, oracle, np.stack([data[start : start + 6].numpy() for start in starts])


@pytest.fixture
def plans(monkeypatch):
    """Nothing is decoded: generate returns its plan, and leaves its processors here."""

    def record(key, plan, trace, params, prompt, prng_key, chain, *rest):
        record.chain = chain
        return plan

    monkeypatch.setattr(decoding, "decode_compiled", record)
    return record


def random_prompts(rows=3, length=4, seed=1):
    return np.random.default_rng(seed).integers(1, PAD, (rows, length))


def pytorchs(oracle, ids, mask=None, pad_token_id=PAD, **options):
    ids = torch.tensor(ids)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    return oracle.generate(
        ids, attention_mask=mask, pad_token_id=pad_token_id, output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def assert_same_ids(got, expected, pad):
    """PyTorch cuts off columns that hold nothing but padding."""
    got, expected = np.asarray(got.sequences), expected.sequences.numpy()
    length = expected.shape[1]
    np.testing.assert_array_equal(got[:, :length], expected)
    assert (got[:, length:] == pad).all()


# ---------------------------------------------------------------- PyTorch's ids


def test_greedy_decoding_is_pytorchs(trained, _quickly, monkeypatch):
    monkeypatch.setattr(decoding, "decode_compiled", _quickly)  # as users have it
    ours, oracle, prompts = trained
    got = ours.generate(prompts, max_new_tokens=24, pad_token_id=1)
    assert isinstance(got, FlaxGreedySearchOutput)
    assert got.sequences.shape == (20, 30) and got.sequences.dtype == jnp.int32
    assert_same_ids(got, pytorchs(oracle, prompts, pad_token_id=1, max_new_tokens=24), 1)
    ends = (np.asarray(got.sequences)[:, 6:] == LINE_END).any(1)
    assert ends.any() and not ends.all()


@pytest.mark.parametrize(
    ("num_beams", "early_stopping", "eos"),
    [
        (3, False, [LINE_END, ord(" ")]),
        pytest.param(2, True, LINE_END, marks=pytest.mark.slow),
        pytest.param(4, "never", LINE_END, marks=pytest.mark.slow),
    ],
)
def test_beam_search_is_pytorchs(trained, num_beams, early_stopping, eos):
    """In ids and scores, for all ways to end; length_penalty is no part of the program."""
    ours, oracle, prompts = trained
    ended = 0
    for penalty in (1.0, 0.0, -0.7, 2.5):
        options = {
            "num_beams": num_beams, "early_stopping": early_stopping, "length_penalty": penalty,
            "num_return_sequences": num_beams, "max_new_tokens": 12, "eos_token_id": eos,
            "pad_token_id": 1,
        }  # fmt: skip
        got, expected = ours.generate(prompts, **options), pytorchs(oracle, prompts, **options)
        assert isinstance(got, FlaxBeamSearchOutput)
        assert got.sequences.shape == (20 * num_beams, 18)
        assert_same_ids(got, expected, 1)
        np.testing.assert_allclose(got.scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)
        ended += (np.asarray(got.sequences)[:, -1] == 1).sum()
    assert ended > 0


@pytest.mark.slow(but_every=3)
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
        {
            "bad_words_ids": [[4], [19, 8]], "sequence_bias": [[[3, 5], 2.0], [[6], -1.0]],
            "suppress_tokens": [13], "begin_suppress_tokens": [7], "forced_eos_token_id": 3,
            "min_length": 9,
        },
        {
            "num_beams": 2, "exponential_decay_length_penalty": (2, 1.4), "eos_token_id": [0, 5],
            "renormalize_logits": True, "remove_invalid_values": True, "repetition_penalty": 1.2,
        },
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_settings_act_as_in_pytorch(twin, options):
    ours, oracle = twin
    prompts = random_prompts(20)
    free = ours.generate(prompts, max_new_tokens=12, pad_token_id=PAD)
    got = ours.generate(prompts, max_new_tokens=12, pad_token_id=PAD, **options)
    assert (got.sequences != free.sequences).any()
    assert_same_ids(got, pytorchs(oracle, prompts, max_new_tokens=12, **options), PAD)


def test_forced_ids_are_forced(model):
    out = model.generate(
        [[5], [9]], max_new_tokens=5, forced_bos_token_id=7, forced_decoder_ids=[[2, 11], [4, 12]],
        pad_token_id=PAD, eos_token_id=None,
    ).sequences  # fmt: skip
    assert (out[:, 1] == 7).all() and (out[:, 2] == 11).all() and (out[:, 4] == 12).all()


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.3}, pytest.param({"num_beams": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_left_padded_prompts_give_what_each_alone_gives(trained, options):
    ours, _, prompts = trained
    options = {"max_new_tokens": 9, "pad_token_id": LINE_END} | options
    padded = np.full((4, 6), LINE_END)
    padded[:, 3:] = prompts[:4, :3]
    padded[3] = prompts[3]
    mask = padded != LINE_END
    mask[:, 3:] = True
    padded[:3, :3] = prompts[4:7, :3]  # what is masked may be anything
    together = ours.generate(padded.tolist(), attention_mask=mask, **options).sequences
    as_ints = ours.generate(padded, attention_mask=jnp.asarray(mask, jnp.int32), **options)
    np.testing.assert_array_equal(together, as_ints.sequences)
    for row in range(3):
        alone = ours.generate(prompts[row : row + 1, :3], **options).sequences
        np.testing.assert_array_equal(together[row, 6:], alone[0, 3:])


def test_a_row_that_has_ended_is_padded(twin):
    ours, _ = twin
    prompts = random_prompts()
    free = np.asarray(ours.generate(prompts, max_new_tokens=9, eos_token_id=None).sequences)
    assert free.shape == (3, 13)
    eos = int(free[0, 6])
    for pad, options in ((PAD + 9, {}), (-100, {"pad_token_id": -100})):
        out = ours.generate(prompts, max_new_tokens=9, eos_token_id=[PAD + 9, eos], **options)
        for row, expected in zip(np.asarray(out.sequences), free, strict=True):
            ends = np.flatnonzero(expected[4:] == eos)
            length = 4 + ends[0] + 1 if len(ends) else len(expected)
            np.testing.assert_array_equal(row[:length], expected[:length])
            assert (row[length:] == pad).all()


# ---------------------------------------------------------------- sampling


def test_sampling_follows_the_models_probabilities(twin):
    ours, _ = twin
    prompts = np.tile(np.array([[3, 7, 5]]), (2, 1))
    out = ours.generate(
        prompts, max_new_tokens=1, do_sample=True, temperature=2.0, top_k=5,
        num_return_sequences=2000,
    )  # fmt: skip
    assert isinstance(out, FlaxSampleOutput)
    assert out.sequences.shape == (4000, 4)
    seen = np.bincount(np.asarray(out.sequences)[:, -1], minlength=31) / 4000
    logits = ours(prompts[:1]).logits[0, -1] / 2.0
    likeliest = np.argsort(logits)[-5:]
    probabilities = np.zeros(31)
    probabilities[likeliest] = jax.nn.softmax(logits[likeliest])
    assert probabilities.max() < 0.95
    np.testing.assert_allclose(seen, probabilities, atol=0.03)


@pytest.mark.slow
def test_only_the_50_likeliest_are_sampled_by_default(trained):
    ours, _, prompts = trained

    def kinds(**options):
        out = ours.generate(
            prompts[:1], max_new_tokens=1, do_sample=True, temperature=50.0,
            num_return_sequences=3000, **options,
        )  # fmt: skip
        return len(np.unique(out.sequences[:, -1]))

    assert kinds() == 50
    assert kinds(top_k=0) == kinds(top_k=None) == 128


def test_a_key_fixes_the_sample(twin):
    ours, _ = twin

    def sample(key=None):
        return np.asarray(
            ours.generate(
                [[3, 7, 5]], max_new_tokens=9, do_sample=True, temperature=9.0, prng_key=key
            ).sequences
        )

    np.testing.assert_array_equal(sample(jax.random.key(0)), sample(jax.random.PRNGKey(0)))
    np.testing.assert_array_equal(sample(), sample(jax.random.PRNGKey(0)))
    assert (sample() != sample(jax.random.key(1))).any()


@pytest.mark.slow
def test_every_warper_is_used_and_in_pytorchs_order(twin, plans):
    ours, oracle = twin
    options = {
        "do_sample": True, "temperature": 0.5, "top_h": 0.9, "top_k": 5, "top_p": 0.9,
        "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
        "renormalize_logits": True, "max_new_tokens": 2,
    }  # fmt: skip
    for num_beams in (1, 2):
        ours.generate([[3]], num_beams=num_beams, **options)
        config = GenerationConfig(num_beams=num_beams, **options)
        config._eos_token_tensor = torch.tensor([0])
        expected = oracle._get_logits_processor(config, 1, device="cpu")
        assert len(plans.chain) == len(expected) == 9
        for got, want in zip(plans.chain, expected, strict=True):
            assert type(got).__name__ == f"Flax{type(want).__name__}"
            ids, scores = np.array([[3, 4]]), np.random.default_rng(0).normal(size=(1, 31))
            np.testing.assert_allclose(
                got(ids, jnp.asarray(scores, jnp.float32), 2),
                want(torch.tensor(ids), torch.tensor(scores, dtype=torch.float32)),
                rtol=1e-5,
            )


@pytest.mark.slow
def test_a_beam_search_samples(twin):
    """Cold, it is the beam search over the scores that the temperature has made."""
    ours, _ = twin
    prompts = random_prompts(5)
    options = {"max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2, "top_k": 0}
    cold = ours.generate(prompts, do_sample=True, temperature=1e-4, **options)
    assert isinstance(cold, FlaxBeamSearchOutput)
    search = ours.generate(
        prompts, logits_processor=[lambda _, scores, __: scores / 1e-4], **options
    )
    np.testing.assert_array_equal(cold.sequences, search.sequences)
    np.testing.assert_allclose(cold.scores, search.scores, rtol=1e-4)
    warm = ours.generate(prompts, do_sample=True, **options)
    again = ours.generate(prompts, do_sample=True, **options)
    np.testing.assert_array_equal(warm.sequences, again.sequences)
    assert (warm.sequences != cold.sequences).any()


# ---------------------------------------------------------------- tracing and compiling


@pytest.mark.slow
def test_generate_can_be_compiled(model):
    ids, mask = random_prompts(), np.array([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 5, "do_sample": True, "num_beams": 2}
    arrays = {"attention_mask": mask, "prng_key": jax.random.PRNGKey(3), "params": model.params}
    plain = model.generate(ids, **arrays, **options).sequences
    compiled = jax.jit(model.generate, static_argnames=list(options))
    np.testing.assert_array_equal(compiled(ids, **arrays, **options).sequences, plain)


@pytest.mark.slow
def test_the_python_loop_gives_the_same(model, caplog):
    ids = random_prompts()
    compiled = model.generate(ids, max_new_tokens=3, do_sample=True)
    looped = model.generate(ids, max_new_tokens=3, do_sample=True, trace=False)
    np.testing.assert_array_equal(looped.sequences, compiled.sequences)
    assert not caplog.messages


def test_padding_on_the_right_is_pointed_out(model, caplog, monkeypatch):
    monkeypatch.setattr(decoding, "decode", lambda *_: None)
    model.generate([[3, 0]], max_new_tokens=1, trace=False)
    model.generate([[3, 4]], max_new_tokens=1, trace=False, attention_mask=[[1, 0]])
    assert caplog.text.count("pad on the left") == 2
    model.generate([[3, 0]], max_new_tokens=1, trace=False, attention_mask=[[1, 1]])
    assert caplog.text.count("pad on the left") == 2


@pytest.mark.slow
def test_one_program_serves_equal_models_and_other_numbers(twin):
    ours, _ = twin
    prompts = np.array([[3, 7, 5, 2, 1]])
    options = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    decoding.decode_compiled.clear_cache()
    ours.generate(prompts, **options)
    assert decoding.decode_compiled._cache_size() == 1
    second = FlaxGPT2LMHeadModel(copy.deepcopy(ours.config), seed=4)
    second.generate(prompts + 1, prng_key=jax.random.PRNGKey(8), **options)
    ours.generate(prompts, **options | {"temperature": 0.7, "top_p": 0.2})
    assert decoding.decode_compiled._cache_size() == 1


@pytest.mark.slow
def test_a_model_of_other_settings_has_a_program_of_its_own(model):
    ids = random_prompts()
    before = model.generate(ids, max_new_tokens=5).sequences
    model.config.layer_norm_epsilon = 1.0
    assert (model.generate(ids, max_new_tokens=5).sequences != before).any()


@pytest.mark.slow
def test_the_program_does_not_keep_a_models_weights(twin):
    ours, _ = twin
    passing = FlaxGPT2LMHeadModel(copy.deepcopy(ours.config), seed=5, dtype=jnp.bfloat16)
    passing.generate([[3, 7]], max_new_tokens=2)
    leaf = weakref.ref(jax.tree.leaves(passing.params)[0])
    del passing
    gc.collect()
    assert leaf() is None


@pytest.mark.slow
def test_a_subclass_may_override_the_hooks(twin):
    ours, _ = twin

    class Backwards(FlaxGPT2LMHeadModel):
        """Positions that stand still."""

        def update_inputs_for_generation(self, model_outputs, model_kwargs):
            kwargs = super().update_inputs_for_generation(model_outputs, model_kwargs)
            return kwargs | {"position_ids": 0 * kwargs["position_ids"]}

    ids = random_prompts()
    odd = Backwards(ours.config, params=ours.params).generate(ids, max_new_tokens=5).sequences
    assert (odd != ours.generate(ids, max_new_tokens=5).sequences).any()


def test_params_may_be_passed(twin):
    ours, _ = twin
    other = FlaxGPT2LMHeadModel(ours.config, seed=7)
    ids = random_prompts()
    expected = ours.generate(ids, max_new_tokens=5).sequences
    got = other.generate(ids, max_new_tokens=5, params=ours.params).sequences
    np.testing.assert_array_equal(got, expected)


def test_a_model_without_a_head_does_not_generate(tiny_config):
    with pytest.raises(TypeError, match="no language-model head; use FlaxGPT2LMHeadModel"):
        generation.generate(FlaxGPT2Model(tiny_config(), _do_init=False), [[1]])


# ---------------------------------------------------------------- processors of the caller


class Only:
    def __init__(self, id):
        self.id = id

    def __call__(self, input_ids, scores, cur_len):
        return jnp.where(jnp.arange(scores.shape[-1])[None, :] == self.id, scores, -jnp.inf)


@pytest.mark.slow
def test_custom_processors_act_and_may_change(model):
    only = Only(9)
    for id in (9, 11):
        only.id = id
        out = model.generate([[3, 4]], max_new_tokens=3, logits_processor=[only])
        assert np.asarray(out.sequences).tolist() == [[3, 4, id, id, id]]


def test_our_processors_may_be_passed_too(model):
    suppress = logits_processors.FlaxSuppressTokensLogitsProcessor(list(range(5, 31)))
    out = model.generate(
        [[3, 4]],
        max_new_tokens=4,
        eos_token_id=None,
        logits_processor=logits_processors.FlaxLogitsProcessorList([suppress]),
    )
    assert out.sequences.max() < 5
    message = "FlaxSuppressTokensLogitsProcessor, and the arguments .* ask for one as well"
    with pytest.raises(ValueError, match=message):
        model.generate([[3]], max_new_tokens=1, suppress_tokens=[1], logits_processor=[suppress])


# ---------------------------------------------------------------- settings


@pytest.mark.usefixtures("plans")
def test_where_settings_come_from(model):
    """A keyword argument before the generation_config given, before the model's own."""
    model.generation_config.max_length = 7
    before = model.generation_config.to_dict()
    ids = [[3, 4, 5]]
    assert model.generate(ids).max_length == 7
    assert model.generate(ids, GenerationConfig(max_length=6)).max_length == 6
    assert model.generate(ids, GenerationConfig(max_length=6), max_length=5).max_length == 5
    assert model.generate(ids, GenerationConfig(max_length=6), max_new_tokens=5).max_length == 8
    assert model.generation_config.to_dict() == before


@pytest.mark.usefixtures("plans")
def test_settings_on_the_models_config_are_obeyed(model):
    model.config.max_length = 6
    model.config.do_sample = True
    with pytest.warns(UserWarning, match="sets do_sample, max_length for generate"):
        plan = model.generate([[3, 4, 5]])
    assert plan.max_length == 6 and plan.sample
    assert model.generate([[3, 4, 5]]).sample  # without a second warning
    model.generation_config.max_length = 7  # changed by hand: now it alone counts
    model.config.max_length = 9
    assert model.generate([[3, 4, 5]]).max_length == 7


def test_what_the_config_says_of_calls_does_not_concern_generate(model):
    model.config.output_hidden_states = True
    model.config.use_cache = False
    model.config.return_dict = False
    assert model.generate(random_prompts(), max_new_tokens=5).sequences.shape == (3, 9)


@pytest.mark.usefixtures("plans")
def test_the_default_length_is_said(model):
    with pytest.warns(UserWarning, match=r"sequences end at max_length=17, prompt included"):
        assert model.generate([[3, 4, 5]]).max_length == 17
    with pytest.warns(UserWarning, match=r"sequences end at max_length=17"):
        assert model.generate([[3, 4, 5]], max_length=None).max_length == 17


@pytest.mark.usefixtures("plans")
def test_common_calls_say_nothing(model, caplog):
    model.generate([[3, 4, 5]], max_new_tokens=2)
    model.generate([[3, 4, 5]], max_length=5)
    model.generate([[3, 4, 5]], max_new_tokens=2, use_cache=True, return_dict_in_generate=True)
    assert not caplog.messages
    model.generate([[3, 4, 5]], max_new_tokens=2, max_length=9)
    assert "max_new_tokens counts" in caplog.text


def test_every_field_of_a_generation_config_is_obeyed_ignored_or_refused():
    groups = [
        set(group)
        for group in (
            generation.DEFAULTS, generation.OBEYED, generation.IGNORED, generation.REFUSED,
            generation.REFUSED_ON_REQUEST,
        )
    ]  # fmt: skip
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert set.union(*groups) == fields | {"forced_decoder_ids"}
    assert sum(map(len, groups)) == len(fields) + 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beam_groups", 2),
        ("diversity_penalty", 0.5),
        ("penalty_alpha", 0.6),
        ("constraints", []),
        ("force_words_ids", [[3]]),
        ("stop_strings", "x"),
        ("max_time", 1.0),
        ("guidance_scale", 2.0),
        ("dola_layers", "low"),
        ("prompt_lookup_num_tokens", 3),
        ("output_scores", True),
        ("output_attentions", True),
        ("token_healing", True),
        ("encoder_repetition_penalty", 1.5),
        ("cache_implementation", "offloaded"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(model, name, value):
    for call in (
        lambda: model.generate([[3]], max_new_tokens=2, **{name: value}),
        lambda: model.generate([[3]], GenerationConfig(max_new_tokens=2, **{name: value})),
    ):
        with pytest.raises(ValueError, match=f"can't obey {name}="):
            call()


@pytest.mark.usefixtures("plans")
def test_unknown_settings_are_refused(model):
    with pytest.raises(ValueError, match="unknown arguments: max_new_token, token_type_ids"):
        model.generate([[3]], max_new_token=2, token_type_ids=[[0]])
    with pytest.raises(ValueError, match="sets max_new_token=2, which generate does not know"):
        model.generate([[3]], GenerationConfig(max_new_token=2))
    assert model.generate([[3]], max_new_tokens=2, token_type_ids=None).max_length == 3


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[3, 7, 5]], {"max_new_tokens": 15}, r"3 prompt ids and 15 .* 17 positions.* at most 14"),
        ([[3] * 17], {"max_new_tokens": 1}, "17 prompt ids and 1 new .* at most 0 new ones"),
        ([[3, 7, 5]], {"max_length": 3}, "max_length=3 leaves no room after a prompt of 3 ids"),
        ([[3, 7]], {"max_length": 5, "min_length": 6}, "min_length=6 is more than max_length=5"),
        ([[3]], {"max_new_tokens": 2, "min_new_tokens": 3}, "min_length=4 is more than .*=3"),
        ([[3]], {"max_new_tokens": 2.0}, "max_new_tokens must be an integer, got 2.0"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([3, 7, 5], {}, r"input_ids must be of shape .* got \(3,\).* one prompt is \[ids\]"),
        ([[]], {}, r"got \(1, 0\)"),
        ([[3.0]], {}, "input_ids must be integers, got float"),
        ([[31]], {}, "input_ids holds 31, but the model's vocabulary has the ids 0 to 30"),
        ([[-1]], {}, "input_ids holds -1"),
        (
            [[3, 7]],
            {"attention_mask": [[1]]},
            r"attention_mask must have .* \(1, 2\), got \(1, 1\)",
        ),
        ([[3]], {"suppress_tokens": [31]}, "suppress_tokens holds 31, .* 0 to 30"),
        ([[3]], {"bad_words_ids": [[3, -4]]}, "bad_words_ids holds -4"),
        ([[3]], {"sequence_bias": [[[40], 1.0]]}, "sequence_bias holds 40"),
        ([[3]], {"forced_decoder_ids": [[1, 99]]}, "forced_decoder_ids holds 99"),
        ([[3]], {"num_return_sequences": 2}, "num_return_sequences"),
        ([[3]], {"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences"),
        ([[3]], {"num_beams": 0}, "num_beams and num_return_sequences must be 1 or more"),
        ([[3]], {"early_stopping": "soon"}, "early_stopping"),
        ([[3]], {"do_sample": True, "temperature": 0.0}, "temperature must be a number"),
        ([[3]], {"do_sample": True, "top_p": 1.5}, "top_p must be a number in .* got 1.5"),
        ([[3]], {"do_sample": True, "top_k": -1}, "top_k must be an integer of at least 1"),
        (
            [[3]],
            {"exponential_decay_length_penalty": (1, 1.1), "eos_token_id": None},
            "exponential_decay_length_penalty needs an eos_token_id",
        ),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(model, ids, options, message):
    if "max_length" not in options:
        options = {"max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **options)


# ---------------------------------------------------------------- text


@pytest.mark.slow
def test_text_goes_in_and_out(tiny_config):
    tokenizer = make_tokenizer("bytes", ())
    model = FlaxGPT2LMHeadModel(tiny_config(vocab_size=257, n_positions=40, n_layer=1))

    def run(prompt, new=8, temperature=1.0, top_k=0, top_p=0.9, seed=3):
        return generation.continue_text(
            model, tokenizer, prompt, new, temperature, top_k, top_p, seed
        )

    assert run("hé").startswith("hé")
    assert run("abc") == run("abc") != run("abc", seed=4)
    assert run("abc", temperature=0.0) == run("abc", temperature=0.0, seed=4)
    assert isinstance(run("", temperature=0.0), str)
    with pytest.raises(UserError, match="at most 0 new ones"):
        run("a" * 40)
    with pytest.raises(UserError, match="top_p must be a number"):
        run("a", top_p=0.0 - 1)
    with pytest.raises(UserError, match="max_new_tokens must be 1 or more"):
        run("a", new=0)
