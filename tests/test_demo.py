import json

import pytest
from PIL import Image

from nba_lightning.app.cli import main


@pytest.mark.parametrize("attack", ["badnets", "blended"])
def test_the_demo_implants_and_removes(attack, tmp_path, capsys):
    main(["demo", "--output", str(tmp_path), "--attack", attack, "--seed", "0"])
    rows = {row["model"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert list(rows) == ["backdoored", "fine-tuned", "nba"]
    assert rows["backdoored"]["asr"] > 0.95
    assert rows["backdoored"]["acc"] > 0.95
    assert rows["backdoored"]["der"] == 0.5
    assert rows["nba"]["asr"] < 0.1
    assert rows["nba"]["ra"] > 0.5
    assert rows["nba"]["acc"] > 0.85
    assert rows["nba"]["der"] > 0.9
    assert {"seed", "versions", "seconds"} <= rows["nba"].keys()
    for name in ("samples", "curves", "attention"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300
    assert (tmp_path / "cleaned.safetensors").is_file()
    assert "fine-tuned" in capsys.readouterr().out


def test_unknown_attack_is_named():
    with pytest.raises(SystemExit, match="Expected `--attack` to be one of badnets, blended, but got 'nothing'"):
        main(["demo", "--attack", "nothing"])
