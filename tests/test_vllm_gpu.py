"""The speculator of vLLM's V2 runner, without a GPU.

Real here: vLLM's plug-in call, `init_speculator`, `SpeculativeConfig`, `InputBatch`, `BaseSpeculator`, and
`RequestState` on its own fall-back for machines without pinned memory. Stood in for, and named so: the one Triton
kernel that applies staged writes, the runner that commits tokens, and the rest of `VllmConfig`. Our CUDA kernels run
under Numba's simulator, which must be chosen before numba.cuda is imported and calls Python functions only: these
tests run themselves again in a process of its own, in which Numba compiles nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import naive_scan
import pytest
from cuda_simulator import SIMULATED, assert_passes_simulated, give_way
from simulated_driver import SimulatedDriver
from small_index import create

from freedraft.integrations.vllm.gpu import install

OURS = ("freedraft.integrations.vllm.gpu.speculator", "freedraft.retrieval.cuda.on_gpu", "numba.cuda")
SLOTS, WIDTH, K, VOCABULARY = 5, 48, 4, 1000


class Own:
    """A stand-in for vLLM's class: it only notes that it was made."""

    def __init__(self, vllm_config, device, req_states):
        self.made_with = (vllm_config, device, req_states)


def config_of(speculative, additional, ranks=1):
    """A stand-in for VllmConfig: what a speculator reads of it."""
    return SimpleNamespace(
        speculative_config=speculative,
        additional_config=additional,
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        scheduler_config=SimpleNamespace(max_num_seqs=SLOTS),
        model_config=SimpleNamespace(max_model_len=WIDTH, get_vocab_size=lambda: VOCABULARY),
    )


def replaced(original=Own):
    module = ModuleType(install.MODULE)
    module.NgramGPUSpeculator = original
    install.replace_class(module)
    return module


@pytest.mark.parametrize(
    ("method", "additional"),
    [("ngram_gpu", {}), ("ngram", {"freedraft": {}}), ("ngram_gpu", {"other": 1}), ("ngram_gpu", object())],
)
def test_vllm_keeps_its_own_class_unless_ours_is_configured(method, additional):
    config = config_of(SimpleNamespace(method=method), additional)
    made = replaced().NgramGPUSpeculator(config, "device", "states")
    assert type(made) is Own
    assert made.made_with == (config, "device", "states")


def test_it_steps_aside_when_the_classes_are_not_as_expected(caplog):
    config = config_of(SimpleNamespace(method="ngram_gpu", num_speculative_tokens=3), {"freedraft": {}})
    own = type("Own", (Own,), {"propose": lambda self, tokens: None})
    with caplog.at_level(logging.WARNING, "freedraft"):
        made = replaced(own).NgramGPUSpeculator(config, SimpleNamespace(type="cuda"), SimpleNamespace())
    assert type(made) is own
    (line,) = caplog.messages
    assert "knows the V2 runner of vLLM 0.32 and 0.33; in this one, " in line
    assert "the base is Own with the abstract methods []" in line
    assert "propose has no dummy_run, input_batch, num_sampled, num_speculative_tokens" in line
    assert "req_states.all_token_ids.gpu is a NoneType" in line
    assert "leaving vLLM's own" in line


def test_replacing_twice_is_replacing_once():
    module = replaced()
    chosen = module.NgramGPUSpeculator
    install.replace_class(module)
    assert module.NgramGPUSpeculator is chosen
    install.replace_class(ModuleType("without_the_class"))


def test_the_plugin_loads_neither_what_is_the_gpus_nor_numba():
    code = (
        "import sys; from freedraft.integrations.vllm.plugin import register; register(); register(); "
        # Numba: vLLM's CPU worker stumbles over llvmlite when it looks through all modules.
        f"print([m for m in sys.modules if m.startswith({(*OURS, 'vllm.v1.worker', 'torch', 'llvmlite')!r})], "
        "[type(f).__module__ for f in sys.meta_path].count('freedraft.integrations.vllm.gpu.install'))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[] 1", ran.stdout + ran.stderr


if not SIMULATED:

    def test_the_speculator_with_vllm_under_the_simulator():
        assert_passes_simulated(__file__, "-k", "simulated")

else:
    import torch

    @pytest.fixture(scope="module")
    def vllm_classes():
        """vLLM's real classes, imported after the plug-in is registered; `loaded`: which of ours that imported."""
        from freedraft.integrations.vllm.plugin import register

        register()
        pytest.importorskip("vllm.v1.worker.gpu.spec_decode.ngram", reason="older vLLM has no such speculator")
        from vllm.config import SpeculativeConfig
        from vllm.v1.worker.gpu import buffer_utils
        from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
        from vllm.v1.worker.gpu.spec_decode import init_speculator
        from vllm.v1.worker.gpu.spec_decode.ngram import speculator
        from vllm.v1.worker.gpu.states import RequestState

        def make(additional, req_states, ranks=1):
            speculative = SpeculativeConfig(method="ngram_gpu", num_speculative_tokens=K)
            return init_speculator(config_of(speculative, additional, ranks), torch.device("cpu"), req_states)

        found = SimpleNamespace(
            make=make,
            RequestState=RequestState,
            InputBatch=InputBatch,
            InputBuffers=InputBuffers,
            buffer_utils=buffer_utils,
            module=speculator,
        )
        # Not configured: vLLM's own is made, which without Triton says so.
        with pytest.raises(RuntimeError, match="requires Triton"):
            make({}, None)
        found.loaded = [name for name in OURS if name in sys.modules]
        give_way()
        return found

    @pytest.fixture
    def states(vllm_classes, monkeypatch):
        """The real RequestState, on vLLM's fall-back for machines without pinned memory."""
        monkeypatch.setattr(vllm_classes.buffer_utils, "is_uva_available", lambda: False)
        monkeypatch.setattr(vllm_classes.buffer_utils.StagedWriteTensor, "apply_write", apply_write_stand_in)
        return vllm_classes.RequestState(
            SLOTS, WIDTH, 64, K, VOCABULARY, torch.device("cpu"), use_dense_all_token_ids=True
        )

    def apply_write_stand_in(self):
        """Stands in for vLLM's Triton kernel: copies each staged piece to its place."""
        begin = 0
        rows = self.gpu.view(self.num_rows, -1)
        staged = zip(self._staged_write_indices, self._staged_write_starts, self._staged_write_cu_lens, strict=True)
        for index, start, end in staged:
            piece = torch.tensor(self._staged_write_contents[begin:end], dtype=self.dtype)
            rows[index, start : start + len(piece)] = piece
            begin = end
        self.clear_staged_writes()

    class RunnerStandIn:
        """Stands in for the V2 model runner: adds and removes requests, commits tokens, asks for drafts."""

        def __init__(self, vllm_classes, states, speculator):
            self.classes, self.states, self.speculator = vllm_classes, states, speculator
            self.texts = {}

        def add(self, name, text):
            self.states.add_request(name, len(text), list(text), 0, WIDTH)
            self.states.apply_staged_writes()
            self.texts[name] = list(text)

        def remove(self, name):
            self.states.remove_request(name)
            del self.texts[name]

        def commit(self, name, *tokens):
            slot = self.states.req_id_to_index[name]
            for token in tokens:
                self.states.all_token_ids.gpu[slot, len(self.texts[name])] = token
                self.texts[name].append(token)
            self.states.total_len.gpu[slot] = len(self.texts[name])
            self.states.last_sampled_tokens[slot] = self.texts[name][-1]

        def propose(self, names, sampled=None, **options):
            batch = self.classes.InputBatch.make_dummy(
                len(names), len(names), self.classes.InputBuffers(SLOTS, 64, torch.device("cpu"))
            )
            slots = torch.tensor([self.states.req_id_to_index[name] for name in names])
            batch = dataclasses.replace(batch, req_ids=list(names), idx_mapping=slots, idx_mapping_np=slots.numpy())
            if not isinstance(sampled, torch.Tensor):
                sampled = torch.tensor([1] * len(names) if sampled is None else sampled, dtype=torch.int32)
            return self.speculator.propose(
                batch,
                None,
                None,
                torch.empty(0),
                None,
                sampled,
                torch.zeros_like(sampled),
                self.states.last_sampled_tokens,
                self.states.next_prefill_tokens,
                torch.zeros(SLOTS),
                torch.zeros(SLOTS, dtype=torch.int64),
                dp_sync_state=None,
                mm_inputs=None,
                **options,
            )

        def expected(self, name, room=K, **rules):
            text = self.texts[name]
            rules = {"longest": 64, "shortest": 1, "least": 0.0, **rules}
            drafts, _ = naive_scan.draft(text, min(room, WIDTH - len(text)), **rules)
            return drafts + [text[-1]] * (K - len(drafts))

    @pytest.fixture
    def runner(vllm_classes, states):
        return RunnerStandIn(vllm_classes, states, vllm_classes.make({"freedraft": {}}, states))

    def test_simulated_nothing_of_ours_is_loaded_for_vllms_own_class(vllm_classes):
        assert vllm_classes.loaded == []

    def test_simulated_vllm_makes_ours_when_it_is_configured(vllm_classes, runner):
        from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

        assert type(runner.speculator).__name__ == "ScanSpeculator"
        assert isinstance(runner.speculator, BaseSpeculator)
        assert runner.speculator.supports_mm_inputs is False
        assert runner.speculator.draft_logits is None
        runner.speculator.init_cudagraph_manager(None)
        runner.speculator.capture()

    def test_simulated_the_start_is_told_in_vllms_log(vllm_classes, states, monkeypatch):
        ours, theirs = logging.getLogger("freedraft"), logging.getLogger("vllm")
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        monkeypatch.setattr(ours, "handlers", [])
        monkeypatch.setattr(theirs, "handlers", [handler])
        monkeypatch.setattr(ours, "level", logging.NOTSET)
        monkeypatch.setattr(theirs, "level", logging.INFO)
        vllm_classes.make({"freedraft": {}}, states)
        told = f"in the place of vLLM's n-gram kernel: {SLOTS} requests of {WIDTH} tokens, {K} drafts"
        assert [line for line in lines if told in line]

    def test_simulated_drafts_are_those_of_the_definition_as_slots_change_owner(runner):
        runner.add("a", [1, 2, 3, 4, 1, 2])
        runner.add("b", [9, 8, 9, 8, 9])
        runner.add("c", [5, 6, 7])
        for step in range(4):
            names = ["c", "a", "b"][step % 2 :]
            drafts = runner.propose(names)
            assert drafts.dtype == torch.int64
            assert drafts.tolist() == [runner.expected(name) for name in names]
            for name, row in zip(names, drafts.tolist(), strict=True):
                runner.commit(name, *row[: step % 3], 5)
        slot = runner.states.req_id_to_index["b"]
        runner.remove("b")
        runner.add("d", [4, 4])
        assert runner.states.req_id_to_index["d"] == slot
        # The previous owner's tokens still lie behind the two new ones.
        assert runner.states.all_token_ids.gpu[slot, 2] == 9
        assert runner.propose(["d", "a"]).tolist() == [[4] * K, runner.expected("a")]

    def test_simulated_a_request_in_its_prompt_gets_fillers(runner):
        runner.add("a", [1, 2, 3, 1, 2])
        runner.add("b", [1, 2, 3, 1, 2])
        assert runner.propose(["a", "b"], [0, 1]).tolist() == [[2] * K, [3, 1, 2, 3]]
        assert runner.speculator.counts[:2].tolist() == [0, K]

    def test_simulated_no_draft_goes_beyond_max_model_len(runner):
        for spare in (0, 1, 3):
            runner.add(f"spare {spare}", ([6, 7] * WIDTH)[: WIDTH - spare])
        assert runner.propose(["spare 0", "spare 1", "spare 3"]).tolist() == [[7] * K, [7, 6, 6, 6], [7, 6, 7, 6]]
        assert runner.speculator.counts[:3].tolist() == [0, 1, 3]

    def test_simulated_a_dummy_run_touches_no_request(runner, monkeypatch):
        runner.add("a", [1, 2, 1])
        monkeypatch.setattr(runner.speculator, "_launch", None)
        before = runner.states.all_token_ids.gpu.clone()
        assert runner.propose(["a"], dummy_run=True, is_profile=True).tolist() == [[0] * K]
        assert runner.states.all_token_ids.gpu.equal(before)
        assert runner.speculator.errors == 0

    def test_simulated_the_batch_fixes_how_many_are_drafted(runner):
        runner.add("a", [1, 2, 3, 1, 2])
        drafts = runner.propose(["a"], num_speculative_tokens=2)
        assert drafts.tolist() == [[3, 1, 2, 2]]
        # The runner marks what it does not schedule, in our buffer.
        drafts[:, 2:] = -1
        assert runner.propose(["a"], num_speculative_tokens=K).tolist() == [[3, 1, 2, 3]]

    def test_simulated_a_failing_step_repeats_the_last_token(runner, monkeypatch, caplog):
        runner.add("a", [1, 2, 1])
        runner.commit("a", 7)

        def fail(*_):
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr(runner.speculator, "_launch", fail)
        with caplog.at_level(logging.ERROR, "freedraft"):
            assert runner.propose(["a"]).tolist() == runner.propose(["a"]).tolist() == [[7] * K]
        assert runner.speculator.errors == 2
        assert len(caplog.messages) == 1
        monkeypatch.setattr(runner.speculator, "_has_peers", True)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            runner.propose(["a"])

    def test_simulated_nothing_is_allocated_and_the_launch_does_not_copy(runner):
        """The arrays that kernels take are torch's own memory, and the same ones at every step."""
        runner.add("a", [1, 2, 1])
        runner.propose(["a"])
        kept = runner.speculator._views[1]
        inputs, outputs = kept
        assert inputs[0].ctypes.data == runner.states.all_token_ids.gpu.data_ptr()
        assert outputs[0].ctypes.data == runner.speculator.drafts.data_ptr()
        runner.commit("a", 2)
        runner.propose(["a"])
        assert runner.speculator._views[1] is kept
        runner.states.total_len.gpu = runner.states.total_len.gpu.clone()
        runner.commit("a", 9, 1)
        assert runner.propose(["a"]).tolist() == [runner.expected("a")]

    def test_simulated_prepared_launches_read_the_runners_own_tensors(vllm_classes, states, tmp_path, monkeypatch):
        """With a stand-in for the driver: a launch a kernel, nothing copied; what is of another type is copied."""
        driver = SimulatedDriver().install(monkeypatch)
        folder = create(tmp_path / "i", [[20, 21, 22, 23, 24, 25]] * 9)
        speculator = vllm_classes.make({"freedraft": {"gpu": {"index": folder}}}, states)
        runner = RunnerStandIn(vllm_classes, states, speculator)
        runner.add("known", [20, 21, 22])
        runner.add("own", [1, 2, 3, 1, 2])
        runner.add("other", [9, 8, 9, 8, 9])
        del driver.launches[:]
        names = ["other", "known", "own"]
        assert runner.propose(names).tolist() == [runner.expected("other"), [23, 24, 25, 22], [3, 1, 2, 3]]
        runner.commit("other", 8, 9, 9)
        assert runner.propose(["own", "other"], num_speculative_tokens=2).tolist() == [
            [3, 1, 2, 2],
            runner.expected("other", 2),
        ]
        blocks, threads = speculator._scan.grid(3)[0], speculator._scan.threads
        assert driver.launches == [
            ((blocks, 3), threads, 0),
            ((3, 1), 1, 0),
            ((blocks, 2), threads, 0),
            ((2, 1), 1, 0),
        ]
        assert not speculator._rows.any()
        assert not speculator._active.any()
        assert runner.propose(names, torch.tensor([1, 0, 1], dtype=torch.int64)).tolist() == [
            runner.expected("other"),
            [22] * K,
            [3, 1, 2, 3],
        ]
        assert speculator._rows[:3].tolist() == [states.req_id_to_index[name] for name in names]
        assert speculator.errors == 0
        states.total_len.gpu = states.total_len.gpu.clone()
        runner.commit("own", 3, 9)
        assert runner.propose(["own"]).tolist() == [runner.expected("own")]

    def test_simulated_a_launch_that_the_driver_refuses_costs_the_drafts(vllm_classes, states, monkeypatch, caplog):
        driver = SimulatedDriver().install(monkeypatch)
        runner = RunnerStandIn(vllm_classes, states, vllm_classes.make({"freedraft": {}}, states))
        runner.add("a", [1, 2, 1])
        runner.commit("a", 7)
        driver.answer = 719
        with caplog.at_level(logging.ERROR, "freedraft"):
            assert runner.propose(["a"]).tolist() == [[7] * K]
        assert runner.speculator.errors == 1
        assert "drafting on the GPU failed" in caplog.text

    def test_simulated_tensors_and_streams_of_a_gpu_are_handed_to_numba(monkeypatch):
        """With stand-ins for the tensor, torch's stream and Numba's driver: who is asked for what."""
        from freedraft.integrations.vllm.gpu import arrays

        asked = []
        driver = SimpleNamespace(
            as_cuda_array=lambda tensor, sync: ("array", tensor, sync),
            external_stream=lambda pointer: asked.append(pointer) or ("stream", pointer),
            select_device=asked.append,
        )
        monkeypatch.setattr(arrays, "cuda", driver)
        device = SimpleNamespace(type="cuda", index=3)
        tensor = SimpleNamespace(device=device)
        assert arrays.as_array(tensor) == ("array", tensor, False)
        streams = arrays.Streams(device)
        current = SimpleNamespace(cuda_stream=0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda given: current if given is device else None)
        assert streams.current() == 0
        current.cuda_stream = 77
        assert streams.current() == streams.current() == ("stream", 77)
        arrays.select_device(device)
        assert asked == [77, 3]

    def test_simulated_settings_reach_the_kernels(vllm_classes, states):
        section = {"min_match": 2, "max_match": 3, "min_probability": 0.5}
        speculator = vllm_classes.make({"freedraft": {"gpu": section}}, states)
        runner = RunnerStandIn(vllm_classes, states, speculator)
        runner.add("a", [1, 2, 3, 1])
        runner.add("b", [1, 2, 3, 4, 1, 2, 3])
        expected = [runner.expected(name, longest=3, shortest=2, least=0.5) for name in ("a", "b")]
        assert expected == [[1] * K, [4, 3, 3, 3]]
        assert runner.propose(["a", "b"]).tolist() == expected

    def test_simulated_indexes_are_drafted_from_where_they_expect_more(vllm_classes, states, tmp_path):
        folder = create(tmp_path / "i", [[20, 21, 22, 23, 24, 25]] * 9)
        runner = RunnerStandIn(
            vllm_classes, states, vllm_classes.make({"freedraft": {"gpu": {"index": folder}}}, states)
        )
        runner.add("known", [20, 21, 22])
        runner.add("own", [1, 2, 3, 1, 2])
        assert runner.propose(["known", "own"]).tolist() == [[23, 24, 25, 22], [3, 1, 2, 3]]
        assert runner.speculator.counts[:2].tolist() == [3, K]
        runner.commit("known", 23, 24)
        assert runner.propose(["own", "known"]).tolist() == [[3, 1, 2, 3], [25, 24, 24, 24]]

    def test_simulated_an_index_that_cannot_be_used_ends_the_start(vllm_classes, states, tmp_path, monkeypatch):
        from freedraft.retrieval.cuda import corpus_on_gpu
        from freedraft.retrieval.errors import CapacityError
        from freedraft.retrieval.index.errors import NotFoundError

        with pytest.raises(NotFoundError, match="no index there"):
            vllm_classes.make({"freedraft": {"gpu": {"index": str(tmp_path)}}}, states)
        folder = create(tmp_path / "i", [[1, 2, 3]])
        monkeypatch.setattr(corpus_on_gpu, "free_bytes", lambda: 1)
        with pytest.raises(CapacityError, match="gpu_memory_utilization"):
            vllm_classes.make({"freedraft": {"gpu": {"index": folder}}}, states)

    def test_simulated_an_index_of_tokens_that_the_model_does_not_have_ends_the_start(vllm_classes, states, tmp_path):
        from freedraft.retrieval.index.errors import DamagedError

        made = [create(tmp_path / f"{last}", [[1, 2, last]]) for last in (VOCABULARY - 1, VOCABULARY)]
        vllm_classes.make({"freedraft": {"gpu": {"index": made[0]}}}, states)
        with pytest.raises(DamagedError, match=r"token id 1000 is not one of 0\.\.999"):
            vllm_classes.make({"freedraft": {"gpu": {"index": made}}}, states)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"gpu": {"longest": 3}}, "gpu: longest: unknown setting"),
            ({"gpu": {"max_match": 0}}, "gpu: max_match: "),
            ({"gpu": {"min_match": 9, "max_match": 3}}, r"min_match must not exceed max_match \(3\)"),
            ({"gpu": 3}, "gpu: expected a mapping"),
            (3, "freedraft: expected a mapping"),
        ],
    )
    def test_simulated_wrong_settings_end_the_start(vllm_classes, states, given, message):
        from freedraft.retrieval.errors import ConfigError

        with pytest.raises(ConfigError, match=message):
            vllm_classes.make({"freedraft": given}, states)

    def test_simulated_an_empty_file_gives_the_defaults(vllm_classes, states, tmp_path):
        (tmp_path / "empty.yaml").write_text("# nothing yet\n")
        vllm_classes.make({"freedraft": {"config": str(tmp_path / "empty.yaml")}}, states)

    def test_simulated_settings_of_other_drafters_are_said_not_to_apply(vllm_classes, states, caplog):
        with caplog.at_level(logging.WARNING, "freedraft"):
            vllm_classes.make({"freedraft": {"drafter": "fusion", "max_tokens": 4}}, states)
        assert "drafter, max_tokens do not apply" in caplog.text

    def test_simulated_it_steps_aside_when_the_tokens_are_elsewhere(vllm_classes, states, caplog):
        states.all_token_ids.gpu = states.all_token_ids.gpu.long()
        for ranks in (1, 2):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "freedraft"), pytest.raises(RuntimeError, match="requires Triton"):
                vllm_classes.make({"freedraft": {}}, states, ranks)
            assert "req_states.all_token_ids.gpu is ('torch.int64', 2, True)" in caplog.text

    def test_simulated_it_steps_aside_when_it_cannot_be_made(vllm_classes, states, monkeypatch, caplog):
        from freedraft.integrations.vllm.gpu import speculator

        def fail(*_, **__):
            raise MemoryError("no room for the workspace")

        monkeypatch.setattr(speculator, "DeviceScan", fail)
        with caplog.at_level(logging.WARNING, "freedraft"), pytest.raises(RuntimeError, match="requires Triton"):
            vllm_classes.make({"freedraft": {}}, states)
        assert "MemoryError: no room for the workspace" in caplog.text
        assert "leaving vLLM's own" in caplog.text
        with pytest.raises(MemoryError, match="no room for the workspace"):
            vllm_classes.make({"freedraft": {}}, states, ranks=2)
