"""Example inputs for models that come without any: declared by their library, or found by a bounded search."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localize import to_local
from localize.convert import infer
from localize.convert.infer import infer_example
from localize.errors import ConfigError
from localize.signature import Call, tensors_of


def shapes(model):
    """Shapes of the inferred inputs, by name where they are keyword arguments."""
    call = Call.of(infer_example(model).inputs)
    if call.kwargs:
        return {name: tuple(value.shape) for name, value in call.kwargs.items()}
    found = [tuple(value.shape) for value in call.args]
    return found[0] if len(found) == 1 else found


# ---------------------------------------------------------------- first layers


class Functional(nn.Module):
    """Parameters of its own that functions are called with."""

    def __init__(self):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(F.conv2d(x, self.weight).mean((2, 3)))


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return x @ self.weight


class LateFirst(nn.Module):
    """The layer that is called first is registered last."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.stem = nn.Linear(8, 4), nn.Linear(12, 8), nn.Conv2d(5, 12, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x).mean((2, 3))))


class LeNet(nn.Module):
    """Made for images of 8; of larger ones it makes several rows a sample, without an error."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 5), nn.Linear(4 * 4 * 4, 10)

    def forward(self, x):
        return self.fc(self.conv(x).view(-1, 4 * 4 * 4))


class Sequence(nn.Module):
    def __init__(self, layer, width, take=0):
        super().__init__()
        self.layer, self.out, self.take = layer, nn.Linear(width, 3), take

    def forward(self, x):
        made = self.layer(x)
        made = made[0] if isinstance(made, tuple) else made
        return self.out(made.mean(1) if self.take == "mean" else made if self.take is None else made[self.take])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0].mean(1))


FIRST_LAYERS = {
    "linear": (lambda: nn.Linear(7, 3), (2, 7)),
    "tokens": (lambda: nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(16), nn.Flatten(), nn.Linear(64, 3)), (2, 16, 7)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 126, 3)), (2, 3, 128)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (2, 3, 32, 32)),
    "conv2d of 84": (
        lambda: nn.Sequential(nn.Conv2d(4, 2, 8, 4), nn.Flatten(), nn.Linear(2 * 20 * 20, 3)),
        (2, 4, 84, 84),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()), (2, 1, 16, 32, 32)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Flatten(2)), (2, 3, 32, 32)),
    "batch norm of vectors": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), (2, 5)),
    "batch norm of maps": (lambda: nn.Sequential(nn.BatchNorm2d(5), nn.AdaptiveMaxPool2d(1)), (2, 5, 32, 32)),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 3)), (2, 6, 32, 32)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), (2, 6)),
    "layer norm of images": (lambda: nn.Sequential(nn.LayerNorm((3, 9, 9)), nn.Conv2d(3, 4, 3)), (2, 3, 9, 9)),
    "embedding": (lambda: Sequence(nn.Embedding(9, 8), 8, "mean"), (2, 16)),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 8), nn.Linear(8, 3)), (2, 16)),
    "attention": (Attention, (2, 16, 8)),
    "encoder": (lambda: Sequence(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 8, "mean"), (2, 16, 8)),
    "functional": (Functional, (2, 3, 32, 32)),
    "product": (Product, (2, 6)),
    "registered late": (LateFirst, (2, 5, 32, 32)),
    "rows for samples": (LeNet, (2, 1, 8, 8)),
}


@pytest.mark.parametrize(("build", "expected"), FIRST_LAYERS.values(), ids=FIRST_LAYERS)
def test_a_search_starts_from_the_first_layer(build, expected):
    model = build()
    assert shapes(model) == expected
    inferred = infer_example(model)
    assert str(expected) in inferred.note
    model(inferred.inputs)  # it is what the model takes


RNNS = {
    "batch second": (lambda: Sequence(nn.LSTM(5, 6), 6, -1), (16, 2, 5)),
    "batch second, every step": (lambda: Sequence(nn.GRU(5, 6), 6, None), (16, 2, 5)),
    "batch first": (lambda: Sequence(nn.GRU(5, 6, batch_first=True), 6, "mean"), (2, 16, 5)),
    "batch first, every step": (lambda: Sequence(nn.LSTM(5, 6, batch_first=True), 6, None), (2, 16, 5)),
    "encoder, batch second": (lambda: Sequence(nn.TransformerEncoderLayer(8, 2, 8), 8, 0), (16, 2, 8)),
    "ids, batch second": (lambda: Sequence(nn.Sequential(nn.Embedding(9, 5), nn.LSTM(5, 6)), 6, -1), (16, 2)),
    "ids, batch first": (
        lambda: Sequence(nn.Sequential(nn.Embedding(9, 5), nn.LSTM(5, 6, batch_first=True)), 6, "mean"),
        (2, 16),
    ),
    "cell": (lambda: Sequence(nn.LSTMCell(5, 6), 6, ...), (2, 5)),
}


@pytest.mark.parametrize(("build", "expected"), RNNS.values(), ids=RNNS)
def test_the_batch_is_where_recurrent_and_attention_layers_expect_it(build, expected):
    assert shapes(build()) == expected


def test_a_model_that_turns_its_batch_first_input_over():
    class Turned(Sequence):
        def forward(self, x):
            return self.out(self.layer(x.transpose(0, 1))[0]).transpose(0, 1)

    assert shapes(Turned(nn.LSTM(5, 6), 6)) == (2, 16, 5)


def test_a_layer_that_takes_the_batch_for_time_is_reported():
    class Confused(nn.Module):
        """Forgets batch_first: it attends over the batch, whichever way it is called."""

        def __init__(self):
            super().__init__()
            self.embed, self.encoder = nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 8)
            self.out = nn.Linear(16 * 8, 3)

        def forward(self, tokens):
            return self.out(self.encoder(self.embed(tokens)).flatten(1))

    inferred = infer_example(Confused())
    assert tuple(inferred.inputs.shape) == (2, 16)
    assert "batch_first" in inferred.note
    assert "TransformerEncoderLayer" in inferred.note


# ---------------------------------------------------------------- several inputs


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Conv2d(3, 8, 3), nn.Linear(16, 3)

    def forward(self, x, image):
        return self.out(torch.cat([self.a(x), self.b(image).mean((2, 3))], 1))


class WideAndDeep(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.out = nn.Embedding(20, 4), nn.Linear(6, 4), nn.Linear(8, 2)

    def forward(self, ids, *, numbers):
        return self.out(torch.cat([self.embed(ids).mean(1), self.linear(numbers)], 1))


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items, self.out = nn.Embedding(11, 4), nn.Embedding(7, 4), nn.Linear(8, 1)

    def forward(self, user, item):
        return self.out(torch.cat([self.users(user), self.items(item)], -1))


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.body = nn.Transformer(8, 2, 1, 1, 8, batch_first=True)

    def forward(self, source, target):
        return self.out(self.body(self.embed(source), self.embed(target)))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Towers, [(2, 4), (2, 3, 32, 32)]),
        (WideAndDeep, {"ids": (2, 16), "numbers": (2, 6)}),
        (Recommender, [(2,), (2,)]),
        (Seq2Seq, [(2, 16), (2, 16)]),
        (lambda: nn.Bilinear(5, 5, 3), [(2, 5), (2, 5)]),
    ],
)
def test_several_required_inputs(build, expected):
    model = build()
    assert shapes(model) == expected
    call = Call.of(infer_example(model).inputs)
    model(*call.args, **call.kwargs)


def test_indices_stay_within_every_embedding():
    model = Recommender()
    user, item = infer_example(model).inputs
    assert user.max() < 11
    assert item.max() < 7


# ---------------------------------------------------------------- what libraries declare


class Declaring(nn.Module):
    def __init__(self, array, norm=False):
        super().__init__()
        self.example_input_array = array
        self.fc = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()

    def forward(self, x, scale=None):
        return self.norm(self.fc(x) * (1 if scale is None else scale))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "array",
    [torch.ones(1, 5), (torch.ones(1, 5), torch.ones(1, 1)), {"x": torch.ones(1, 5), "scale": torch.ones(1, 1)}],
    ids=["tensor", "tuple", "dict"],
)
def test_example_input_array_is_taken_at_its_word(array, norm):
    inferred = infer_example(Declaring(array, norm))
    assert type(inferred.inputs) is type(array)
    assert {t.shape[0] for t in tensors_of(inferred.inputs)} == {2 if norm else 1}
    assert "example_input_array" in inferred.note
    if not norm:
        assert inferred.inputs is array


def test_a_lightning_module():
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
            self.example_input_array = torch.randn(1, 5)

        def forward(self, x):
            return self.body(x)

    local = to_local(Net(), method="early_exit", parts=2)
    assert local.plan.inputs[0].shape == (2, 5)
    assert "example_input_array" in local.plan.notes[0]


TORCHVISION = {
    "alexnet": (2, 3, 224, 224),
    "convnext_tiny": (2, 3, 224, 224),
    "densenet121": (2, 3, 224, 224),
    "efficientnet_b0": (2, 3, 224, 224),
    "inception_v3": (2, 3, 299, 299),
    "mnasnet0_5": (2, 3, 224, 224),
    "mobilenet_v3_small": (2, 3, 224, 224),
    "regnet_x_400mf": (2, 3, 224, 224),
    "resnet18": (2, 3, 224, 224),
    "shufflenet_v2_x0_5": (2, 3, 224, 224),
    "squeezenet1_0": (2, 3, 224, 224),
    "swin_t": (2, 3, 224, 224),
    "vgg11": (2, 3, 224, 224),
    "vit_b_16": (2, 3, 224, 224),
    "lraspp_mobilenet_v3_large": (2, 3, 224, 224),
    "r3d_18": (2, 3, 16, 112, 112),
    "mvit_v2_s": (2, 3, 16, 224, 224),
    "s3d": (2, 3, 16, 224, 224),
    "swin3d_t": (2, 3, 16, 112, 112),
    "raft_small": [(2, 3, 128, 128), (2, 3, 128, 128)],
}


@pytest.mark.parametrize(("name", "expected"), TORCHVISION.items())
def test_torchvision_models(name, expected):
    models = pytest.importorskip("torchvision").models
    options = {"weights_backbone": None} if "mobilenet_v3_large" in name else {}
    if name == "inception_v3":
        options["init_weights"] = False
    # Not a number is computed: the weights need not be any. (RegNets compute their widths with tensors.)
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = models.get_model(name, weights=None, **options)
    assert shapes(model.to_empty(device="cpu")) == expected


def test_a_torchvision_model_whose_first_layer_was_replaced():
    models = pytest.importorskip("torchvision").models
    model = models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1)
    assert shapes(model) == (2, 1, 224, 224)


TIMM = [
    ("beit_base_patch16_224", {}, (3, 224, 224)),
    ("coatnet_0_rw_224", {}, (3, 224, 224)),
    ("convnext_atto", {"in_chans": 1}, (1, 224, 224)),
    ("deit_tiny_patch16_224", {"img_size": 64}, (3, 64, 64)),
    ("efficientnet_b0", {}, (3, 224, 224)),
    ("ghostnet_100", {}, (3, 224, 224)),
    ("levit_128s", {}, (3, 224, 224)),
    ("mixer_s32_224", {}, (3, 224, 224)),
    ("nfnet_l0", {}, (3, 224, 224)),
    ("resnet10t", {"in_chans": 2}, (2, 176, 176)),
    ("resnet18", {}, (3, 224, 224)),
    ("swin_tiny_patch4_window7_224", {}, (3, 224, 224)),
    ("tf_efficientnetv2_b0", {}, (3, 192, 192)),
    ("tresnet_m", {}, (3, 224, 224)),
    ("vit_tiny_patch16_224", {"img_size": (32, 64), "in_chans": 5}, (5, 32, 64)),
    ("volo_d1_224", {}, (3, 224, 224)),
    ("xcit_nano_12_p16_224", {}, (3, 224, 224)),
]


@pytest.mark.parametrize(("name", "options", "expected"), TIMM, ids=[name for name, _, _ in TIMM])
def test_timm_models(name, options, expected):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, **options)
    assert shapes(model) == (2, *expected)
    assert "pretrained_cfg" in infer_example(model).note


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BOTH = {"d_model": 16, "vocab_size": 50} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
}
TEXT, SOUND = {"vocab_size": 50} | SMALL, {"num_mel_bins": 16}
IDS, BOTH_IDS = {"input_ids": (2, 16)}, {"input_ids": (2, 16), "decoder_input_ids": (2, 12)}
IMAGE, CLIP = {"pixel_values": (2, 3, 32, 32)}, {"pixel_values": (2, 4, 3, 32, 32)}
PATCHES = {"image_size": 32, "patch_size": 8} | SMALL
GPT = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
LOW_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TRANSFORMERS = [
    ("SequenceClassification", "bert", TEXT, IDS),
    ("SequenceClassification", "distilbert", {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2}, IDS),
    ("MaskedLM", "albert", TEXT | {"embedding_size": 8}, IDS),
    ("TokenClassification", "electra", TEXT | {"embedding_size": 8}, IDS),
    ("CausalLM", "gpt2", GPT, IDS),
    ("CausalLM", "gpt2", GPT | {"n_positions": 8}, {"input_ids": (2, 8)}),
    ("CausalLM", "llama", TEXT | {"num_key_value_heads": 1}, IDS),
    ("CausalLM", "mixtral", TEXT | {"num_key_value_heads": 1, "num_local_experts": 2}, IDS),
    ("CausalLM", "mamba", {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}, IDS),
    ("Seq2SeqLM", "t5", T5, BOTH_IDS),
    ("Seq2SeqLM", "bart", BOTH, IDS),
    ("SequenceClassification", "bart", BOTH, IDS),
    ("SpeechSeq2Seq", "whisper", BOTH | SOUND | LOW_IDS | {"max_source_positions": 50},
     {"input_features": (2, 16, 100), "decoder_input_ids": (2, 12)}),
    ("AudioClassification", "wav2vec2",
     SMALL | {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embedding_groups": 2},
     {"input_values": (2, 16000)}),
    ("AudioClassification", "audio-spectrogram-transformer", SMALL | SOUND | {"max_length": 32},
     {"input_values": (2, 32, 16)}),
    ("ImageClassification", "vit", PATCHES | {"num_channels": 1}, {"pixel_values": (2, 1, 32, 32)}),
    ("ImageClassification", "convnext", {"image_size": 32, "hidden_sizes": [8] * 4, "depths": [1] * 4}, IMAGE),
    ("VideoClassification", "videomae", PATCHES | {"num_frames": 4}, CLIP),
    ("VideoClassification", "timesformer", PATCHES | {"num_frames": 4}, CLIP),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family", "options", "expected"), TRANSFORMERS, ids=[f"{case[1]}-{case[0]}" for case in TRANSFORMERS]
)
def test_transformers_models(kind, family, options, expected):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **options)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    assert shapes(model) == expected
    inferred = infer_example(model)
    assert family in inferred.note
    with torch.no_grad():
        output = model(**inferred.inputs)  # ids within the vocabulary, what the configuration asks for
    assert all(torch.isfinite(t).all() for t in tensors_of(output.logits))


def test_a_transformers_model_of_images_and_text():
    transformers = pytest.importorskip("transformers")
    text, vision = TEXT | {"bos_token_id": 1, "eos_token_id": 2}, PATCHES
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    assert shapes(model) == IDS | IMAGE


# ---------------------------------------------------------------- what must not happen


@pytest.mark.parametrize("module", [nn.Identity(), nn.Sequential()])
def test_nothing_is_guessed_from_nothing(module):
    with pytest.raises(ConfigError, match=r"Pass example_inputs=: a tensor, a tuple .*--input-shape"):
        infer_example(module)


def test_an_input_under_which_samples_cannot_be_told_apart_is_none():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(x.mean(0))

    with pytest.raises(ConfigError, match="does not grow with the batch"):
        infer_example(Pooled())


def test_the_error_names_the_arguments_and_what_went_wrong():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, points, mask, width=3):
            assert mask.dtype == torch.bool, "a mask of booleans"
            return self.fc(points * mask)

    with pytest.raises(ConfigError, match=r"(?s)a mask of booleans.*it needs points, mask"):
        infer_example(Picky())


def test_the_search_is_bounded():
    calls = []

    class Never(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(i + 1, 4, 3) for i in range(40)])

        def forward(self, x):
            calls.append(tuple(x.shape))
            raise ValueError("never")

    with pytest.raises(ConfigError):
        infer_example(Never())
    assert len(calls) == len(set(calls))
    assert 20 < len(calls) <= infer._TRIES


def test_nothing_is_computed_and_nothing_changes():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
            self.seen = []

        def forward(self, x):
            self.seen.append(type(x).__name__)
            kinds.add(type(x).__name__)
            return self.fc(self.norm(self.conv(x)).mean((2, 3)))

    kinds: set[str] = set()
    model = Watched().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    first, second = infer_example(model), infer_example(model)
    assert kinds == {"FakeTensor"}
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(torch.get_rng_state(), expected)
    assert model.training
    assert not model.seen
    assert not model._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_values_are_looked_at_only_where_the_model_does():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(x) if x.sum().item() > -1e9 else self.fc(-x)

    assert shapes(Gated()) == (2, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_are_in_the_precision_of_the_model(dtype):
    assert infer_example(nn.Linear(5, 3).to(dtype)).inputs.dtype == dtype


def test_the_choice_is_reported():
    local = to_local(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), method="early_exit")
    note = "example inputs (2, 5) inferred from layer '0' (Linear)"
    assert note in local.plan.notes
    assert f"note: {note}" in str(local.plan)
    assert note in local.plan.to_dict()["notes"]
