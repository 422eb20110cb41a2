"""Configuration and the registry: the same mapping from a dict, JSON or YAML, and clear refusals."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest

from freedraft.plugins import registry
from freedraft.plugins.base import Drafter
from freedraft.plugins.config import DEFAULT_DRAFTER, parse_config
from freedraft.plugins.prompt_lookup import PromptLookup
from freedraft.retrieval.errors import ConfigError, FreedraftError

VALUES = {"drafter": "prompt_lookup", "max_match": 7, "memory": "64MiB", "vllm": {"log_interval": 3}}


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str):
        path = tmp_path / "freedraft.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


class TestParse:
    def test_dict_json_yaml_and_file_reference_agree(self, yaml_file):
        path = yaml_file("drafter: prompt_lookup\nmax_match: 7\nmemory: 64MiB\nvllm:\n  log_interval: 3\n")
        parsed = parse_config(VALUES)
        assert parsed.drafter == "prompt_lookup"
        assert parsed.settings == {"max_match": 7, "memory": "64MiB"}
        assert parsed.sections == {"generate": {}, "gpu": {}, "pacing": {}, "vllm": {"log_interval": 3}}
        for source in (json.dumps(VALUES), path, str(path), {"config": str(path)}, parsed):
            assert parse_config(source) == parsed

    def test_nothing_given_is_the_default(self, yaml_file):
        for source in (None, {}, "{}", yaml_file("")):
            assert parse_config(source).drafter == DEFAULT_DRAFTER

    @pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "3"])
    def test_yaml_that_is_no_mapping(self, yaml_file, text):
        with pytest.raises(ConfigError, match=r"freedraft\.yaml: expected a mapping"):
            parse_config(yaml_file(text))

    def test_yaml_that_is_no_yaml(self, yaml_file):
        with pytest.raises(ConfigError, match="not valid YAML"):
            parse_config(yaml_file("a: [1, 2"))

    def test_yaml_cannot_build_objects(self, yaml_file):
        with pytest.raises(ConfigError, match="not valid YAML"):
            parse_config(yaml_file("drafter: !!python/object/apply:os.getcwd []"))

    @pytest.mark.parametrize("source", [3, [1], b"{}", "[1, 2]", 1.5, True])
    def test_what_is_no_configuration(self, source):
        with pytest.raises(ConfigError, match=r"configuration: expected|expected a mapping"):
            parse_config(source)

    @pytest.mark.parametrize("text", ["drafter: prompt_lookup\ndrafter: fusion\n", "vllm:\n  a: 1\n  a: 2\n"])
    def test_a_key_that_is_there_twice(self, yaml_file, text):
        with pytest.raises(ConfigError, match=r"(drafter|a): the key is there twice"):
            parse_config(yaml_file(text))
        with pytest.raises(ConfigError, match="twice"):
            parse_config('{"max_tokens": 1, "max_tokens": 2}')

    def test_a_file_does_not_lead_to_a_file(self, yaml_file):
        path = yaml_file("config: other.yaml\n")
        # `config` is then a setting like any other, and no drafter has it.
        assert parse_config(path).settings == {"config": "other.yaml"}

    def test_nesting_without_end(self, yaml_file):
        deep = "[" * 100_000
        for source in ('{"a": ' + deep, yaml_file("a: " + deep)):
            with pytest.raises(ConfigError, match="not valid"):
                parse_config(source)

    def test_a_path_that_is_none(self):
        with pytest.raises(ConfigError, match="null"):
            parse_config("a\0b")

    def test_json_that_is_no_json(self):
        with pytest.raises(ConfigError, match="not valid JSON"):
            parse_config('{"drafter": ')

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match="nowhere"):
            parse_config(tmp_path / "nowhere.yaml")

    @pytest.mark.parametrize("values", [{"drafter": 3}, {"vllm": [1]}, {"config": 5}])
    def test_wrong_types_name_the_key(self, values):
        with pytest.raises(ConfigError, match=next(iter(values))):
            parse_config(values)


class TestSettings:
    def test_a_typo_names_the_key_and_what_is_allowed(self):
        with pytest.raises(ConfigError) as caught:
            registry.make_drafter("suffix_automaton", {"max_tokns": 3})
        message = str(caught.value)
        assert "suffix_automaton: max_tokns: unknown setting; did you mean max_tokens?" in message
        assert "min_probability" in message

    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("suffix_automaton", {"max_tokens": 0}, "max_tokens: .*greater than or equal to 1, got 0"),
            ("suffix_automaton", {"max_tokens": "many"}, "max_tokens: .*integer.*got 'many'"),
            ("suffix_automaton", {"min_probability": 1.5}, "min_probability: .*less than or equal to 1"),
            ("suffix_automaton", {"memory": "1 horse"}, "memory: .*byte"),
            ("suffix_automaton", {"max_tokens": True}, "max_tokens: .*not true or false, got True"),
            ("suffix_automaton", {"min_expected": False}, "min_expected: .*not true or false"),
            ("suffix_automaton", {"min_expected": float("inf")}, "min_expected: .*finite"),
            ("suffix_automaton", {"tokens_per_match": 1e30}, "tokens_per_match: .*less than"),
            ("suffix_automaton", {"min_match": 10**30}, "min_match: .*less than"),
            ("prompt_lookup", {"min_match": 4, "max_match": 3}, r"^prompt_lookup: [^:]*min_match must not exceed"),
            ("prompt_lookup", {"occurrence": "latest"}, "occurrence: .*'recent' or 'earliest', got 'latest'"),
        ],
    )
    def test_bad_values_name_key_value_and_bound(self, name, settings, message):
        with pytest.raises(ConfigError, match=message):
            registry.make_drafter(name, settings)

    def test_every_bad_key_is_named_at_once(self):
        with pytest.raises(ConfigError) as caught:
            registry.make_drafter("prompt_lookup", {"min_match": 0, "colour": "red"})
        assert "min_match" in str(caught.value)
        assert "colour" in str(caught.value)


class TestRegistry:
    def test_ours_are_there_and_keep_the_contract(self):
        assert {"prompt_lookup", "suffix_automaton"} <= set(registry.drafter_names())
        for name in ("prompt_lookup", "suffix_automaton"):
            assert isinstance(registry.make_drafter(name, {"memory": "4MiB"}), Drafter)

    def test_an_unknown_name_lists_the_known(self):
        with pytest.raises(ConfigError, match=r"did you mean suffix_automaton\?.*prompt_lookup"):
            registry.make_drafter("sufix_automaton")

    def test_a_third_party_adds_one_by_entry_point(self, monkeypatch, tmp_path):
        # A real installed distribution, as pip would leave it: a module and its dist-info.
        (tmp_path / "theirs.py").write_text(
            "from freedraft.plugins.prompt_lookup import PromptLookup\nclass Theirs(PromptLookup):\n    pass\n"
        )
        info = tmp_path / "theirs-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[{registry.GROUP}]\ntheirs = theirs:Theirs\nprompt_lookup = theirs:Theirs\nbroken = theirs:GROUP\n"
        )
        (tmp_path / "theirs.py").open("a").write("GROUP = 3\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert "theirs" in registry.drafter_names()
        assert type(registry.make_drafter("theirs", {"memory": "4MiB"})).__name__ == "Theirs"
        # Nobody can take one of our names.
        assert registry.drafter_class("prompt_lookup") is PromptLookup
        with pytest.raises(ConfigError, match=r"broken.*is not a Drafter"):
            registry.make_drafter("broken")

    def test_our_entry_points_load(self):
        for name in registry.drafter_names():
            entry = registry._installed()[name]
            assert isinstance(entry, EntryPoint)
            assert entry.load().Settings is not None

    def test_errors_are_of_the_family(self):
        assert issubclass(ConfigError, FreedraftError)
        assert issubclass(ConfigError, ValueError)
