"""The table of methods, options and their errors, rules from outside."""

from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import pytest

from localize.errors import MethodError
from localize.heads import registry
from localize.heads.base import Method
from localize.heads.registry import get_method, list_methods, method_class, register_method, resolve_method

NAMES = ["bp", "scpl", "al", "nwise", "lct", "early_exit", "joint"]


@pytest.fixture(autouse=True)
def clean_table(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def test_every_method_is_listed_and_loads():
    assert list_methods() == NAMES
    for name in NAMES:
        method = get_method(name)
        assert method.name == name
        assert isinstance(method, method_class(name))
        assert method.summary
        assert method.source
        assert get_method(name, **method.options()) == method


@pytest.mark.parametrize("name", NAMES)
def test_methods_are_frozen(name):
    method = get_method(name)
    with pytest.raises(FrozenInstanceError):
        method.anything = 1  # type: ignore[attr-defined]


def test_unknown_name_suggests_the_closest():
    with pytest.raises(
        MethodError, match=r"Unknown method 'scp'. Did you mean 'scpl'\? Methods: bp, scpl, al"
    ):
        get_method("scp")


def test_unknown_option_suggests_the_closest():
    with pytest.raises(MethodError, match=r"'scpl' has no option 'temprature'. Did you mean 'temperature'\?"):
        get_method("scpl", temprature=1)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("scpl", {"temperature": 0}, "temperature=0 is not a positive number"),
        ("scpl", {"temperature": float("nan")}, "temperature=nan"),
        ("scpl", {"temperature": float("inf")}, "temperature=inf"),
        ("scpl", {"projector": "mpl"}, "Did you mean 'mlp'"),
        ("scpl", {"normalizer": "none"}, "'reference', 'khosla'"),
        ("scpl", {"pool": 1}, "pool=1"),
        ("scpl", {"classifier": "off"}, "'detached', 'joint'"),
        ("scpl", {"hidden": 1.5}, "hidden=1.5 is not a positive integer"),
        ("scpl", {"projection": -1}, "projection=-1"),
        ("al", {"hidden": 0}, "hidden=0"),
        ("nwise", {"reach": 0}, "reach=0"),
        ("nwise", {"reach": True}, "reach=True"),
        ("nwise", {"gradient": "all"}, "'furthest', 'sum'"),
        ("nwise", {"head": "covn"}, "Did you mean 'conv'"),
        ("lct", {"critic": "big"}, "'auto', 'conv', 'imagenet', 'linear'"),
        ("lct", {"pool": "no"}, "'auto', 'flatten'"),
        ("early_exit", {"hidden": -2}, "hidden=-2"),
        ("joint", {"hidden": -2}, "hidden=-2"),
        ("joint", {"exit_weight": 0}, "exit_weight=0"),
    ],
)
def test_options_out_of_range(name, options, words):
    with pytest.raises(MethodError, match=words) as error:
        get_method(name, **options)
    assert name in str(error.value)


def test_all_bad_options_are_reported_at_once():
    with pytest.raises(MethodError) as error:
        get_method("nwise", reach=-1, gradient="x", head="y")
    assert len(str(error.value).splitlines()) == 4


def test_resolve_takes_names_instances_and_classes():
    nwise = get_method("nwise", reach=3)
    assert resolve_method(nwise) is nwise
    assert resolve_method("nwise") == get_method("nwise")
    assert resolve_method(method_class("nwise")) == get_method("nwise")
    with pytest.raises(MethodError, match="neither a name"):
        resolve_method(3)  # type: ignore[arg-type]


def make_rule(rule_name="mine"):
    @dataclass(frozen=True)
    class Mine(Method):
        name: ClassVar[str] = rule_name
        strength: float = 1.0

        def build_head(self, site):
            return None

    return Mine


def test_a_rule_from_outside_is_known_by_its_name():
    rule = make_rule()
    assert register_method(rule) is rule
    assert list_methods()[-1] == "mine"
    assert get_method("mine", strength=2.0) == rule(2.0)
    assert resolve_method("mine") == rule()
    with pytest.raises(MethodError, match="no option 'strenth'"):
        get_method("mine", strenth=1)


def test_an_instance_registers_its_options_as_defaults():
    register_method(make_rule()(strength=5.0))
    assert get_method("mine").options() == {"strength": 5.0}
    assert get_method("mine", strength=6.0).options() == {"strength": 6.0}
    with pytest.raises(MethodError, match="no option"):
        get_method("mine", nothing=1)


def test_registering_again_replaces_so_that_a_cell_can_be_rerun():
    register_method(make_rule())
    newer = make_rule()
    register_method(newer)
    assert method_class("mine") is newer


def test_names_taken_are_refused():
    with pytest.raises(MethodError, match=r"'scpl' is taken by localize\.heads\.scpl:SCPL"):
        register_method(make_rule("scpl"))


def test_what_cannot_be_registered():
    with pytest.raises(MethodError, match="subclass of Method"):
        register_method(int)  # type: ignore[type-var]

    @dataclass(frozen=True)
    class Nameless(Method):
        pass

    with pytest.raises(MethodError, match="class attribute name"):
        register_method(Nameless)

    class Undecorated(Method):
        name: ClassVar[str] = "undecorated"
        strength: float = 1.0

    with pytest.raises(MethodError, match=r"@dataclass\(frozen=True\)"):
        register_method(Undecorated)
