import pytest
import torch

from models.training.curves import MetricsLogger, read_metrics


def test_weighted_means_and_reset(tmp_path):
    log = MetricsLogger(tmp_path, tensorboard=False)
    log.add("kd", torch.tensor(1.0), 1)
    log.add("kd", torch.tensor(4.0), 3)
    line = log.flush(2, learning_rate=0.5)
    assert (line["step"], line["kd"], line["learning_rate"]) == (2, 3.25, 0.5)
    assert "kd" not in log.flush(3)
    log.close()
    assert [x["step"] for x in read_metrics(tmp_path / "metrics.jsonl")] == [2, 3]


def test_resume_drops_later_lines_and_keeps_open_sums(tmp_path):
    log = MetricsLogger(tmp_path, tensorboard=False)
    for step in range(1, 7):
        log.add("loss", float(step))
        if step == 4:
            state = log.state_dict()
        if step % 3 == 0:
            log.flush(step)
    log.close()
    log = MetricsLogger(tmp_path, tensorboard=False, resume_step=4)
    log.load_state_dict(state)
    log.add("loss", 5.0)
    log.add("loss", 6.0)
    log.flush(6)
    log.close()
    assert [(x["step"], x["loss"]) for x in read_metrics(log.path)] == [(3, 2.0), (6, 5.0)]


def test_a_cut_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none") == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLogger(tmp_path, tensorboard=True)
    log.add("loss", 1.5)
    log.flush(7)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 1.5)]


def test_a_kill_while_a_resumed_run_opens_the_file_loses_no_line(tmp_path, monkeypatch):
    log = MetricsLogger(tmp_path, tensorboard=False)
    log.flush(1)
    log.close()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("models.io_utils.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLogger(tmp_path, tensorboard=False, resume_step=1)
    assert [x["step"] for x in read_metrics(tmp_path / "metrics.jsonl")] == [1]
