"""Completions from a server: tokens and log-probs are the model's, new weights arrive, failures are put in words."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_server import FakeServer
from tiny_text import build_causal

from shared.errors import UserError
from shared.runtime.generation import Sampling
from shared.runtime.servers import ServerGenerator
from shared.runtime.servers_weights import merged_state, write_weights

GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
PROMPTS = torch.tensor([[0, 0, 20, 21, 22], [30, 31, 32, 33, 34], [0, 40, 41, 42, 43]])
INPUTS = {"input_ids": PROMPTS, "attention_mask": (PROMPTS != 0).long()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_causal("qwen2", tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def serve(folder, tokenizer, tmp_path):
    """`serve(server options…)(engine options…)` is the server and an engine on it."""
    running = []

    def start(**options):
        server = FakeServer(folder, **options).__enter__()
        running.append(server)

        def engine(**settings):
            settings = {"sync_dir": tmp_path / "sync", "backoff": 0.001, "timeout": 20.0, **settings}
            return server, ServerGenerator(server.url, tokenizer, **settings)

        return engine

    yield start
    for server in running:
        server.__exit__()


def greedy(model, new=6):
    """What the model itself says, one list of tokens a prompt, its ending token included."""
    rows = []
    for prompt, mask in zip(PROMPTS, INPUTS["attention_mask"], strict=True):
        ids = prompt[mask.bool()][None]
        rows.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                   max_new_tokens=new)[0, ids.shape[1] :].tolist())  # fmt: skip
    return rows


def logp(model, prompt, ids, temperature):
    row = torch.cat([prompt[prompt != 0], ids])[None]
    with torch.no_grad():
        logits = model(input_ids=row).logits[0, -len(ids) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, ids[:, None]).squeeze(1)


def shifted(model):
    """The model after something like training: other answers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def adapted(model, **options):
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(**config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


@pytest.mark.parametrize("concurrency", [1, 2, 64])
def test_greedy_completions_are_the_model_s_in_the_order_of_the_prompts(serve, model, concurrency):
    server, engine = serve()(concurrency=concurrency)
    found = engine.generate(model, INPUTS, 2, GREEDY)
    assert [row.tolist() for row in found.ids] == [row for row in greedy(model) for _ in range(2)]
    assert len(server.seen("/v1/completions")) == min(concurrency, 3)
    for row, values, prompt in zip(found.ids, found.logp, PROMPTS.repeat_interleave(2, 0), strict=True):
        assert row.dtype == torch.int64 and values.dtype == torch.float32
        torch.testing.assert_close(values, logp(model, prompt, row, 1.0), atol=1e-5, rtol=0)
    assert engine.exact is False


def test_a_group_is_sampled_with_its_log_probs(serve, model):
    _, engine = serve()()
    sampling = Sampling(max_new_tokens=5, temperature=0.7)
    found = engine.generate(model, INPUTS, 4, sampling)
    assert len(found.ids) == len(found.logp) == len(found.finished) == 12
    assert len({tuple(row.tolist()) for row in found.ids[:4]}) > 1
    for row, values, prompt in zip(found.ids, found.logp, PROMPTS.repeat_interleave(4, 0), strict=True):
        torch.testing.assert_close(values, logp(model, prompt, row, 0.7), atol=1e-5, rtol=0)


def test_seeds_come_from_the_generator_that_is_given(serve, model):
    _, engine = serve()(seeded=True)
    sampling = Sampling(max_new_tokens=5)
    first, again, other = (
        [row.tolist() for row in engine.generate(model, INPUTS, 3, sampling, random=random).ids]
        for random in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1), torch.Generator())
    )
    assert first == again != other


def test_an_end_token_or_a_stop_string_finishes_a_row(serve, model, tokenizer):
    _, engine = serve()()
    full = greedy(model)
    assert engine.generate(model, INPUTS, 1, GREEDY).finished == [len(row) < 6 for row in full]
    stop = tokenizer.decode(full[0][:3])
    found = engine.generate(model, INPUTS, 1, Sampling(max_new_tokens=6, temperature=0.0, stop=(stop,)))
    assert found.ids[0].tolist() == full[0][:3] and found.finished[0]
    _, engine = serve()(end_ids=[full[1][2]])
    found = engine.generate(model, INPUTS, 1, GREEDY)
    cut = full[1].index(full[1][2]) + 1
    assert found.ids[1].tolist() == full[1][:cut] and found.finished[1]


@pytest.mark.parametrize(
    "mode, dev_mode, settings, told",
    [
        ("processed_logprobs", True, {"temperature": 0.5}, True),
        ("processed_logprobs", True, {"top_k": 3}, False),
        ("processed_logprobs", True, {"repetition_penalty": 1.2}, False),
        ("raw_logprobs", True, {"temperature": 0.5}, False),
        ("raw_logprobs", True, {"top_p": 0.5}, True),
        ("raw_logprobs", False, {"top_p": 0.5}, False),  # not said which: only where both agree
        ("raw_logprobs", False, {}, True),
    ],
)
def test_log_probs_are_given_only_where_they_are_those_of_the_policy(serve, model, mode, dev_mode, settings, told,
                                                                     caplog):  # fmt: skip
    _, engine = serve(logprobs_mode=mode, dev_mode=dev_mode)()
    sampling = Sampling(max_new_tokens=4, **settings)
    with caplog.at_level(logging.WARNING):
        found = [engine.generate(model, INPUTS, 2, sampling) for _ in range(2)][0]
    assert (found.logp is not None) == told
    assert len([each for each in caplog.records if "--logprobs-mode" in each.message]) == (0 if told else 1)
    if told:
        for row, values, prompt in zip(found.ids, found.logp, PROMPTS.repeat_interleave(2, 0), strict=True):
            expected = logp(model, prompt, row, settings.get("temperature", 1.0))
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


def test_new_weights_change_the_answers(serve, model, tmp_path):
    server, engine = serve()()
    before = greedy(model)
    assert [row.tolist() for row in engine.generate(model, INPUTS, 1, GREEDY).ids] == before
    for _ in range(2):  # a second update, over the first
        engine.update_weights(shifted(model))
        after = greedy(model)
        assert after != before
        assert [row.tolist() for row in engine.generate(model, INPUTS, 1, GREEDY).ids] == after
        before = after
    assert len(list((tmp_path / "sync").iterdir())) == 1  # the weights before the last ones are gone


def test_a_state_that_was_gathered_is_what_is_sent(serve, model):
    import copy

    _, engine = serve()(dtype=torch.bfloat16)
    other = shifted(copy.deepcopy(model))
    engine.update_weights(model, state_dict=other.state_dict)
    rounded = other.bfloat16().float()
    assert [row.tolist() for row in engine.generate(model, INPUTS, 1, GREEDY).ids] == greedy(rounded) != greedy(model)


def test_an_adapter_is_merged_and_the_model_stays_as_it_was(serve, model):
    model = adapted(model).bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, engine = serve()()
    engine.update_weights(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    found = [row.tolist() for row in engine.generate(model, INPUTS, 1, GREEDY).ids]
    assert found == greedy(model.merge_and_unload().float())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=str,
)
def test_merged_weights_have_the_base_model_s_names_and_the_adapter_s_values(model, options):
    names = set(model.state_dict())
    model = adapted(model, **options)
    found = {name: value.clone() for name, value in merged_state(model).items()}
    expected = model.merge_and_unload().state_dict()
    assert set(found) == names
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_server_loads_an_adapter_alone(serve, folder, model, tmp_path):
    server, engine = serve(adapters=True, dev_mode=False)(weights="lora", logprobs_mode="processed_logprobs")
    base = greedy(model)
    assert [row.tolist() for row in engine.generate(model, INPUTS, 1, GREEDY).ids] == base
    model = adapted(model)
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.3)
        engine.update_weights(model)
        expected = greedy(model)
        assert [row.tolist() for row in engine.generate(model, INPUTS, 1, GREEDY).ids] == expected != base
        base = expected
    assert len(server.adapters) == 1 and len(list((tmp_path / "sync").iterdir())) == 1
    assert sum(path.stat().st_size for path in (tmp_path / "sync").rglob("*.safetensors")) < 20_000


def test_what_cannot_be_sent_is_refused(serve, model):
    _, engine = serve()()
    with pytest.raises(UserError, match="sharded and have an adapter"):
        engine.update_weights(adapted(model), state_dict=model.state_dict())
    _, engine = serve(adapters=True)(weights="lora")
    with pytest.raises(UserError, match="the model has none"):
        engine.update_weights(build_causal("qwen2"))
    with pytest.raises(UserError, match="LoRA with use_dora"):
        engine.update_weights(adapted(build_causal("qwen2"), use_dora=True))


def test_shards_are_refused(model, tmp_path):
    weight = model.lm_head.weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)  # as ZeRO-3 leaves a parameter between forward passes
    with pytest.raises(UserError, match="sharded over processes.*get_state_dict"):
        write_weights(model, tmp_path / "out")


def test_a_server_that_cannot_reload_says_so(serve, model, tmp_path):
    _, engine = serve(dev_mode=False)()
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1 vllm serve"):
        engine.update_weights(model)
    _, engine = serve()(server_sync_dir="/somewhere/else")
    with pytest.raises(UserError, match="be able to read /somewhere/else"):
        engine.update_weights(model)


def test_passing_failures_are_retried(serve, model):
    server, engine = serve()()
    server.failures["/v1/completions"] = [503, "drop", 429]
    assert [row.tolist() for row in engine.generate(model, INPUTS, 1, GREEDY).ids] == greedy(model)
    assert len(server.seen("/v1/completions")) == 6
    server, engine = serve()(retries=1, concurrency=1)
    server.failures["/v1/completions"] = [503, 503]
    with pytest.raises(UserError, match="answered 503: made to fail"):
        engine.generate(model, INPUTS, 1, GREEDY)


def test_refusals_and_timeouts_are_not_retried(serve, model):
    server, engine = serve()(concurrency=1)
    server.failures["/v1/completions"] = [400]
    with pytest.raises(UserError, match="answered 400: made to fail"):
        engine.generate(model, INPUTS, 1, GREEDY)
    server, engine = serve()(concurrency=1, timeout=0.2)
    server.failures["/v1/completions"] = [1.0]
    with pytest.raises(UserError, match="did not answer within 0.2 seconds"):
        engine.generate(model, INPUTS, 1, GREEDY)
    assert len(server.seen("/v1/completions")) == 1


def test_no_server_says_what_to_start(tokenizer, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot be reached.*VLLM_SERVER_DEV_MODE=1 vllm serve .*--logprobs-mode"):
            ServerGenerator(address, tokenizer, sync_dir=tmp_path)
    with pytest.raises(UserError, match="in full, such as http"):
        ServerGenerator("localhost:8000", tokenizer, sync_dir=tmp_path)
    with pytest.raises(UserError, match="not one of full, lora"):
        ServerGenerator(address, tokenizer, sync_dir=tmp_path, weights="delta")


def test_a_starting_server_is_waited_for(folder, tokenizer, tmp_path):
    with FakeServer(folder) as server:
        server.failures["/v1/models"] = [503, "drop"]
        ServerGenerator(server.url + "/v1/", tokenizer, sync_dir=tmp_path, startup_timeout=10, backoff=0.001,
                        api_key="secret")  # fmt: skip
        assert len(server.seen("/v1/models")) == 3
        assert server.headers[-1]["Authorization"] == "Bearer secret"


def test_another_model_than_the_policy_is_noticed(serve, tokenizer, tmp_path, tiny):
    with pytest.raises(UserError, match="serves tiny, not big"):
        serve()(model="big")
    from transformers import AutoTokenizer

    server, _ = serve()()
    other = AutoTokenizer.from_pretrained(tiny("gemma3"))
    with pytest.raises(UserError, match="another tokenizer than the policy's"):
        ServerGenerator(server.url, other, sync_dir=tmp_path)


def test_prompts_that_the_server_cannot_take_are_refused(serve, model):
    _, engine = serve(max_model_len=10)()
    with pytest.raises(UserError, match="do not fit into the server's 10"):
        engine.generate(model, INPUTS, 1, GREEDY)
    with pytest.raises(UserError, match="pixel_values.*in-process engine"):
        engine.generate(model, {**INPUTS, "pixel_values": torch.zeros(1)}, 1, GREEDY)


def test_a_server_without_tokens_is_refused(serve, model):
    server, engine = serve()()
    server.routes["/v1/completions"] = lambda body: {
        "choices": [{"index": index, "text": "x", "finish_reason": "stop"} for index in range(len(body["prompt"]))]
    }
    with pytest.raises(UserError, match="return_token_ids"):
        engine.generate(model, INPUTS, 1, GREEDY)


WORKER = """
import sys
import torch
from accelerate import PartialState

process = PartialState(cpu=True)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.errors import UserError
from shared.runtime.generation import Sampling
from shared.runtime.servers import ServerGenerator

folder, url, sync = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
engine = ServerGenerator(url, AutoTokenizer.from_pretrained(folder), sync_dir=sync, backoff=0.001)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(-1.5)
ids = torch.tensor([[20 + process.process_index, 21, 22]])
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
expected = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, 3:].tolist()
sharded = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
said = ""
try:
    engine.update_weights(sharded)
except UserError as error:
    said = str(error)
engine.update_weights(sharded, state_dict=lambda: {k: v.full_tensor() for k, v in sharded.state_dict().items()})
found = engine.generate(model, inputs, 1, Sampling(max_new_tokens=6, temperature=0.0)).ids[0].tolist()
assert "sharded over processes" in said, said
assert found == expected, (found, expected)
process.wait_for_everyone()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_main_process_sends_and_each_asks_for_its_own_prompts(folder, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}",
    }
    with FakeServer(folder) as server:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                   tmp_path / "worker.py", folder, server.url, tmp_path / "sync"]  # fmt: skip
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(server.seen("/collective_rpc")) == 1 and len(server.seen("/v1/completions")) == 2
