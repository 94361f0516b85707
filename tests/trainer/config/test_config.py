"""Settings: strict, and every mistake one line that says where."""

import ast
import dataclasses
import re
from collections import defaultdict
from pathlib import Path
from typing import get_args

import pytest
import yaml

import trainer
from trainer import config as settings
from trainer.config import Config, ConfigError, load


@pytest.mark.parametrize("name", settings.packaged())
def test_packaged_configurations_load_and_survive_a_round_trip(name, tmp_path):
    config = load(name)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load(str(path)) == config
    assert config.run.output == f"runs/{name}"


def test_overrides_are_typed_like_the_file():
    config = load(
        "toy",
        [
            "ppo.lr=1e-4",
            "groups.on=response",
            "kl.adaptive=false",
            "kl.target=[3, 5.5]",
            "toy.shares={copy: 1, sort: 2}",
            "toy.lazy={}",
            "data.columns.domain=info.topic",
            "model.reward=",
            "groups.inference=none",
        ],
    )
    assert config.ppo.lr == 1e-4 and isinstance(config.ppo.lr, float)
    assert config.groups.on == "response" and config.kl.adaptive is False
    assert config.kl.target == (3.0, 5.5)
    assert config.toy.domains == ("copy", "sort")
    assert config.data.columns.domain == "info.topic"
    assert config.model.reward == "" and not config.groups.active


def test_keys_that_yaml_1_1_takes_for_truth_values(tmp_path):
    """`on:` would be the key True, and `1e-4` a text."""
    path = tmp_path / "c.yaml"
    path.write_text("groups:\n  on: response\n  focus: 0\nppo:\n  lr: 1e-4\n")
    config = load(str(path))
    assert config.groups.on == "response" and config.ppo.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("groups.bta=1", "groups.bta: unknown key (did you mean beta?)"),
        ("toy.pairs={sort: 1.5}", "toy.pairs.sort: is 1.5; want a share, 0 to 1"),
        ("toy.pairs={sotr: 1}", "toy.pairs.sotr: is 'sotr'; want one of"),
        ("lr=1", "unknown section (did you mean sft.lr or rm.lr or ppo.lr or metarm.lr?)"),
        ("groups.beta=abc", "groups.beta: is 'abc'; want number"),
        ("groups.beta=true", "groups.beta: is True; want number"),
        ("ppo.steps=1.5", "ppo.steps: is 1.5; want whole number"),
        ("kl.adaptive=1", "kl.adaptive: is 1; want true or false"),
        ("groups.inference=exat", "(did you mean exact?)"),
        ("ppo.minibatches=3", "ppo.minibatches: is 3; want a divisor of"),
        ("ppo.clip_low=0", "ppo.clip_low: is 0.0; want more than 0"),
        ("ppo.clip_low=.nan", "want a finite number"),
        ("ppo.cispo_cap=[2, 1]", "ppo.cispo_cap: is [2.0, 1.0]; want [low, high] with 0 <= low"),
        ("ppo.gspo_clip=[0, 1]", "ppo.gspo_clip: is [0.0, 1.0]; want [low, high] more than 0"),
        ("ppo.loss=gspo", "ppo.advantages: is 'gae'; want group_norm or leave_one_out with loss="),
        ("ppo.advantages=group_norm", "ppo.samples_per_prompt: is 1; want 2 or more"),
        ("rollout.top_p=0", "rollout.top_p: is 0.0; want more than 0, at most 1"),
        ("rollout.top_k=-1", "rollout.top_k: is -1; want 0 (off) or more"),
        ("run.stages=[sft, pop]", "run.stages: is 'pop'; want one of sft, rm, ppo"),
        ("groups.clamp=[1]", "groups.clamp: is [1]; want a list of 2 numbers"),
        ("groups.min_size=1000", "groups.min_size: is 1000; want at most 32"),
        ("toy.shares.fly=1", "toy.shares.fly: is 'fly'; want one of copy"),
        ("groups.beta.x=1", "groups.beta: is {'x': 1}; want number"),
        (
            "reward.functions=[{function: f}]",
            "functions[0].function: is 'f'; want package",
        ),
        ("reward.functions=[{function: regx}]", "regex, verifier (did you mean regex?)"),
        ("reward.functions=[{function: regex}]", "reward.functions[0].pattern: is ''; want a reg"),
        ("reward.functions=[{function: regex, pattern: '('}]", "functions[0].pattern: is '(': mis"),
        ("reward.functions=[{function: regex, texts: [a]}]", "functions[0].texts: unknown key"),
        ("reward.functions=[{function: length}]", "functions[0].most: is 0; want 1 or more"),
        ("reward.functions=[{function: length, most: 3, least: 4}]", "want least (4) or more"),
        ("reward.functions=[{function: contains}]", "functions[0].texts: is []; want some, or"),
        ("reward.functions=[{function: choice, letters: AA}]", "two or more different letters"),
        ("reward.functions=[{function: http, url: there}]", "functions[0].url: is 'there'; want h"),
        ("reward.functions=[{function: http, url: 'http://a', timeout: 0}]", "[0].timeout: is 0.0"),
        (
            "reward.functions=[{function: judge, url: 'http://a'}]",
            "functions[0].model: is ''",
        ),
        (
            "reward.functions=[{function: 'a:b', name: total}]",
            "[0].name: 'total' is taken",
        ),
        ("reward.functions=[{function: 'a:model'}]", "[0].name: 'model' is taken: scores"),
        ("rm.rating=0", "rm.rating > 0 with it"),
        ("baselines.b=[sft.lr=1]", "changes what baselines share"),
        ("baselines.b=[ppo.lr=x]", "baselines.b: override 'ppo.lr=x': ppo.lr: is 'x'"),
        ("ppo.lr", "want section.key=value"),
        ("ppo.lr=[", "not YAML"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(override, message):
    with pytest.raises(ConfigError) as error:
        load("toy", [override])
    text = str(error.value)
    assert message in text and "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo:\n  steps: 3\n  stpes: 4\n", ":3: ppo.stpes: unknown key (did you mean steps?)"),
        ("ppo:\n  steps: three\n", ":2: ppo.steps: is 'three'; want whole number"),
        ("\n\npop:\n  steps: 3\n", ":3: pop: unknown section (did you mean ppo?)"),
        ("ppo:\n  lam: 2\n", ":2: ppo.lam: is 2.0; want 0 to 1"),
        ("ppo:\n  lam: 1\n  lam: 1\n", ":3: ppo.lam: given twice"),
        ("ppo:\n  lam: [1\nkl: 3\n", "not YAML"),
        ("ppo: 3\n", ":1: ppo: is 3; want keys with values"),
        ("- 1\n", "want sections with keys"),
        ("baselines:\n  a: [ppo.lr=x]\n", ":2: baselines.a: override 'ppo.lr=x'"),
        (
            "reward:\n  functions:\n    - function: a:b\n    - {function: a:c, wight: 1}\n",
            ":4: reward.functions[1].wight: unknown key (did you mean weight?)",
        ),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(str(path))
    assert str(error.value).startswith(f"{path}")
    assert message in str(error.value) and "\n" not in str(error.value)


def write(folder, **files):
    """Files of these names and texts; the path of the first."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_a_base_is_inherited_key_by_key(tmp_path):
    path = write(
        tmp_path,
        own="base: toy\nppo:\n  steps: 3\ndata:\n  columns: {prompt: text}\n"
        "toy:\n  shares: {copy: 1, sort: 1}\n  lazy: {}\nbaselines:\n  b0: [groups.beta=0]\n",
    )
    own, base = load(str(path)), load("toy")
    assert own.run.output == "runs/own"
    assert own.ppo == dataclasses.replace(base.ppo, steps=3)
    # A section in a section merges, too; the value of a key is taken whole.
    assert own.data.columns.prompt == "text" and own.data.max_prompt_tokens == 32
    assert own.toy.domains == ("copy", "sort")
    assert list(own.baselines) == ["ppo", "b0"]
    assert own.rm == base.rm and own.kl == base.kl
    assert "base" not in own.to_dict()
    resolved = write(tmp_path / "elsewhere", config=own.to_yaml())
    assert load(str(resolved)) == own


def test_a_base_is_a_path_from_the_file_that_names_it_and_may_have_its_own(tmp_path):
    write(tmp_path, root="ppo:\n  steps: 1\n  warmup: 2\n")
    write(tmp_path / "lower", middle="base: ../root.yaml\nppo:\n  steps: 5\n  lam: 0.5\n")
    path = write(tmp_path / "top", own="base: ../lower/middle.yaml\nppo:\n  lam: 1\n")
    ppo = load(str(path), ["ppo.gamma=0.5"]).ppo
    assert (ppo.steps, ppo.warmup, ppo.lam, ppo.gamma) == (5, 2, 1.0, 0.5)


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        ("base: other.yaml\nppo: {lr: 1}\n", "\nppo:\n  lam: 2\n", "other.yaml:3: ppo.lam: is 2"),
        ("base: other.yaml\nppo: {lam: 3}\n", "ppo:\n  lam: 2\n", "own.yaml:2: ppo.lam: is 3"),
        ("base: other.yaml\nppo: 3\n", "ppo: {lam: 1}\n", "own.yaml:2: ppo: is 3; want keys"),
        ("base: other.yaml\n", "ppo: {stpes: 1}\n", "other.yaml:1: ppo.stpes: unknown key"),
        (  # what two files say together
            "base: other.yaml\nppo:\n  prompts_per_step: 16\n",
            "\ngroups:\n  min_size: 5\n",
            "other.yaml:3: groups.min_size: is 5; want at most 4",
        ),
        ("ppo: {lam: 1}\nbase: other.yaml\n", "base: own.yaml\n", "other.yaml:1: base: inherits "
         "from itself: own.yaml -> other.yaml -> own.yaml"),
        ("base: own.yaml\n", "", "own.yaml:1: base: inherits from itself: own.yaml -> own.yaml"),
        ("\nbase: tyo\n", "", "own.yaml:2: base: tyo: no packaged configuration of this name (did"),
        ("base: no.yaml\n", "", "no.yaml: no such file"),
        ("base: [toy]\n", "", "own.yaml:1: base: is ['toy']; want a packaged configuration or a"),
        ("base: other.yaml\n", "ppo: [1\n", "other.yaml:2: not YAML"),
        ("ppo:\n  base: toy\n", "", "own.yaml:2: ppo.base: unknown key"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_or_its_base_is_one_line_with_its_place(own, other, message, tmp_path):
    path = write(tmp_path, own=own, other=other)
    with pytest.raises(ConfigError) as error:
        load(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="did you mean toy"):
        load("tyo")
    with pytest.raises(ConfigError, match="no such file"):
        load(str(tmp_path / "none.yaml"))


def test_a_baseline_is_the_run_with_its_overrides_in_its_own_folder():
    config = load("toy", ["run.output=here"])
    plain = config.baseline("ppo")
    assert plain.run.output == "here/baselines/ppo" and plain.baselines == {}
    assert not plain.groups.active
    assert settings.differences(plain, config) == [
        "baselines: None -> {}",
        "baselines.ppo: ['groups.inference=none', 'kl.coef=0.45'] -> None",
        "groups.inference: 'exact' -> 'none'",
        "kl.coef: 0.6 -> 0.45",
    ]
    assert plain.sft == config.sft and plain.ppo == config.ppo


def every_setting(section=Config, above=""):
    """(key, Setting) of every setting, of sections within sections too."""
    for each in settings.fields_of(section):
        key = f"{above}{each.name}"
        yield key, each
        if each.section:
            yield from every_setting(each.section, f"{key}.")


def test_sections_are_frozen_and_every_setting_is_documented():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().ppo.lr = 1.0
    for key, setting in every_setting():
        assert len(setting.doc) > 5, key
        assert yaml.safe_load(settings.as_yaml(setting.default)) == setting.default


def test_what_changes_no_result_is_no_difference():
    cosmetic = {key for key, setting in every_setting() if not setting.result}
    assert {"run.output", "run.ranks", "trainer.keep_last", "rollout.timeout"} <= cosmetic
    one = load("toy")
    other = load("toy", ["run.output=there", "run.ranks=4", "trainer.keep_last=5"])
    assert settings.differences(one, other) == []
    assert settings.differences(one, load("toy", ["kl.floor=0"])) == ["kl.floor: 0.0 -> 0.5"]


@pytest.mark.parametrize(
    ("arguments", "wrong", "message"),
    [
        (dict(low=0), -1, "0 or more"),
        (dict(above=0), 0, "more than 0"),
        (dict(low=0, high=1), 1.5, "0 to 1"),
        (dict(low=0, below=1), 1, "[0, 1)"),
        (dict(above=0, high=1), 0, "(0, 1]"),
        (dict(above=0, below=1), 1, "more than 0 and less than 1"),
        (dict(low=0, want="0 (off) or more"), -1, "0 (off) or more"),
    ],
)
def test_bounds_are_checked_when_a_section_is_made(arguments, wrong, message):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Example(settings.Section, at="example"):
        share: float = settings.key(0.5, "A number.", **arguments)

    assert Example().share == 0.5
    with pytest.raises(ConfigError) as error:
        Example(share=wrong)
    assert str(error.value) == f"example.share: is {wrong}; want {message}"


# A setting that nothing reads is worse than none: it can be set, and nothing happens.


def sections_of(section=Config):
    """Attribute that leads to a section -> its class, of sections within sections too."""
    found = {}
    for each in settings.fields_of(section):
        for kind in (each.kind, *get_args(each.kind)):  # a tuple of sections: reward.functions
            if isinstance(kind, type) and issubclass(kind, settings.Section):
                found |= {each.name: kind, **sections_of(kind)}
    return found


SECTIONS = sections_of() | {kind.__name__: kind for kind in settings.NAMED.values()}
CLASSES = {kind.__name__: name for name, kind in SECTIONS.items()}


class Reads:
    """found: (section, attribute) of all that one module reads of sections.

    A section is an expression that ends in its name (config.ppo), what was assigned from one or
    loops over one, and what is annotated with its class. getattr(section, name) reads whatever
    stands as a text in the module: a loop over names, a table of them.
    """

    def __init__(self, tree, of=""):
        self.known = defaultdict(set)  # a name, or self.name -> sections
        self.known["self"] = {CLASSES[of]} if of in CLASSES else set()
        nodes = list(ast.walk(tree))
        self.texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
        for _ in range(2):  # for a name that comes from another one
            for node in nodes:
                self.bind(node)
        self.found = {read for node in nodes for read in self.read(node)}

    def section(self, node):
        if isinstance(node, ast.Attribute) and node.attr in SECTIONS:
            return {node.attr}
        return (
            self.known[ast.unparse(node)] if isinstance(node, ast.Name | ast.Attribute) else set()
        )

    def bind(self, node):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, node.value)
        elif isinstance(node, ast.NamedExpr):
            self.assign(node.target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self.loop(node.target, node.iter)
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            for kind in CLASSES.keys() & set(re.findall(r"\w+", ast.unparse(node.annotation))):
                self.known[name].add(CLASSES[kind])
                self.known[f"self.{name}"].add(CLASSES[kind])

    def loop(self, target, values):
        if isinstance(values, ast.Call) and ast.unparse(values.func) == "enumerate":
            target, values = target.elts[-1], values.args[0]
        self.assign(target, values)

    def assign(self, target, value):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each, part in zip(target.elts, value.elts):
                self.assign(each, part)
        else:
            self.known[ast.unparse(target)] |= self.section(value)

    def read(self, node):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            return {(section, node.attr) for section in self.section(node.value)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            where, name = node.args[:2]
            names = {name.value} if isinstance(name, ast.Constant) else self.texts
            return {(section, each) for section in self.section(where) for each in names}
        return set()


def read_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.parent.name != "config":
        return Reads(tree).found
    # Settings read one another: in properties, which is for others, and in checks, which is not.
    reads = set()
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for part in kind.body:
            if isinstance(part, ast.FunctionDef) and part.name != "relations":
                reads |= Reads(part, kind.name).found
    return reads


def test_every_setting_is_read():
    def named(section):
        return issubclass(section, settings.RewardFunction)

    modules = list(Path(trainer.__file__).parent.rglob("*.py"))
    read = set().union(*map(read_in, modules))
    unread = {
        f"{name}.{setting.name}"
        for name, section in SECTIONS.items()
        for setting in settings.fields_of(section)
        if (name, setting.name) not in read
        # what a named reward has in common with all others
        and not (named(section) and ("functions", setting.name) in read)
    }
    assert not unread, f"nothing reads {', '.join(sorted(unread))}"


@pytest.mark.parametrize(
    "source",
    [
        "config.eval.every",
        "ppo, of = config.ppo, config.eval\nof.every",
        "class A:\n def __init__(self):\n  self.of = config.eval\n def f(self): self.of.every",
        "def f(of: Eval): of.every",
        "class A:\n of: Eval | None\n def f(self): self.of.every",
        "getattr(config.eval, 'every')",
        "for name in ('every', 'batch'): getattr(config.eval, name)",
        "[of.every for i, of in enumerate(config.eval)]",
    ],
)
def test_what_counts_as_reading_a_setting(source):
    assert ("eval", "every") in Reads(ast.parse(source)).found


@pytest.mark.parametrize(
    "source", ["config.eval", "config.eval.every = 1", "of.every", "config.ppo.every", "'every'"]
)
def test_what_does_not(source):
    assert ("eval", "every") not in Reads(ast.parse(source)).found
