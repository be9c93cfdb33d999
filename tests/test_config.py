import hydra

from fewshot.config import compose


def test_another_programs_own_configuration_outlives_ours(tmp_path):
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("way=3", "run_dir=here").way == 3
        assert hydra.compose("theirs").a == 1
