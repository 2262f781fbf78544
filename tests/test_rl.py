"""Reinforcement learning: games side by side, what a rollout teaches, the policy that acts, whole runs of CartPole."""

import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from helpers import assert_same_bits

from collage import fp8
from collage.harness.cli import main
from collage.harness.rl import acting, playing, ppo, rollouts
from collage.harness.tasks.games import GAMES
from collage.harness.tasks.policies import ActorCritic
from collage.harness.tasks.recipes import build
from collage.harness.train import loops
from collage.harness.train.config import RunConfig

GAME = replace(GAMES["cartpole"], actors=3, horizon=40)


def network(dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> ActorCritic:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ActorCritic(4, 2, 16, 2)
    with torch.no_grad():
        model.policy[-1].weight.mul_(scale)
    return model.to(dtype)


def rollout(seed: int = 0) -> rollouts.Rollout:
    return rollouts.collect(GAME, playing.Table(GAME, GAME.actors, seed), acting.Actor(network(), seed))


def test_both_networks_of_a_recipe_have_its_shape():
    counts = {name: sum(p.numel() for p in build(name).parameters()) for name in GAMES}
    hidden = 64 * 64 + 64
    assert counts["cartpole"] == 2 * (4 * 64 + 64 + hidden) + 64 * 2 + 2 + 64 + 1
    assert counts["acrobot"] == 2 * (6 * 64 + 64 + hidden) + 64 * 3 + 3 + 64 + 1


def test_a_table_is_a_function_of_its_seed_and_the_actions():
    first, again, other = rollout(0), rollout(0), rollout(1)
    for name, tensor in vars(first).items():
        assert_same_bits(name, getattr(again, name), tensor)
    assert not torch.equal(first.observations, other.observations)
    starts = torch.cat([playing.Table(GAME, 3, seed).observations for seed in range(3)])
    assert len(starts.unique(dim=0)) == 9  # neighbouring seeds share no game


def test_a_move_that_ends_a_game_leads_to_that_games_end_and_on_from_a_new_one():
    seen = rollout()
    time, game = seen.over.nonzero()[0].tolist()
    assert seen.terminated[time, game]
    assert seen.reached[time, game, 2].abs() > 0.2095  # the pole's angle, 12 degrees: where CartPole ends
    assert (seen.observations[time + 1, game].abs() <= 0.05).all()  # where it begins
    going = ~seen.over[:-1]
    assert_same_bits("from where the last move led", seen.observations[1:][going], seen.reached[:-1][going])


def test_a_game_whose_time_is_up_is_over_and_not_terminated():
    table = playing.Table(replace(GAME, environment="Acrobot-v1"), 2, seed=0)
    for _ in range(499):
        assert not table.move(torch.ones(2, dtype=torch.int64)).over.any()  # no torque: it never swings up
    last = table.move(torch.ones(2, dtype=torch.int64))
    assert last.truncated.tolist() == [True, True]
    assert not last.terminated.any()


def test_advantages_are_discounted_surprises_until_the_game_is_over():
    g = torch.Generator().manual_seed(0)
    rewards, values, reached = (torch.randn(12, 3, generator=g, dtype=torch.float64) for _ in range(3))
    over = torch.rand(12, 3, generator=g) < 0.2
    terminated = over & (torch.rand(12, 3, generator=g) < 0.5)
    found = ppo.advantages(GAME, rewards, terminated, over, values, reached)
    for game in range(3):
        for t in range(12):
            expected, weight = 0.0, 1.0
            for k in range(t, 12):
                goes_on = 0.0 if terminated[k, game] else reached[k, game].item()
                expected += weight * (rewards[k, game].item() + GAME.gamma * goes_on - values[k, game].item())
                weight *= GAME.gamma * GAME.gae_lambda
                if over[k, game]:
                    break
            assert found[t, game].item() == pytest.approx(expected, rel=1e-12)  # another order of the same sums


def some(count: int = 64) -> tuple[ppo.Samples, torch.Tensor, torch.Tensor]:
    """Samples, and the log-probabilities and values of the policy that made them."""
    g = torch.Generator().manual_seed(1)
    logs = torch.randn(count, 2, generator=g).log_softmax(-1)
    actions = torch.randint(2, (count,), generator=g)
    values, gains = torch.randn(count, generator=g), torch.randn(count, generator=g)
    observations = torch.randn(count, 4, generator=g)
    return ppo.Samples(observations, actions, acting.of_actions(logs, actions), gains, values + gains), logs, values


def test_the_first_step_on_a_rollout_has_the_policy_gradient():
    """At a ratio of 1 the clipped objective's gradient is that of log-probability times advantage."""
    samples, logs, values = some()
    logs.requires_grad_()
    gain = (samples.advantages - samples.advantages.mean()) / samples.advantages.std(correction=0)
    plain = -(acting.of_actions(logs, samples.actions) * gain).mean()
    (expected,) = torch.autograd.grad(plain, logs)
    (found,) = torch.autograd.grad(ppo.loss(GAME, logs, values, samples), logs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # 1e-8 beside the deviation; another order


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_probability_that_has_gone_far_enough_is_pushed_no_further(sign):
    samples, logs, values = some()
    gain = samples.advantages - samples.advantages.mean()
    gone = replace(samples, acted=samples.acted - sign * math.log(1.0 + 2 * GAME.clip))  # the ratio is above or below
    logs.requires_grad_()
    (found,) = torch.autograd.grad(ppo.loss(GAME, logs, values, gone), logs)
    pushed = found.abs().sum(-1) > 0
    assert pushed.tolist() == (gain * sign < 0).tolist()


def test_the_value_learns_the_return_and_entropy_is_a_bonus():
    samples, logs, _ = some()
    game = replace(GAME, entropy=0.5)
    uniform = torch.full_like(logs, math.log(0.5))
    plain = [ppo.loss(replace(game, entropy=0.0), x, samples.returns, samples).item() for x in (logs, uniform)]
    bonus = [ppo.loss(game, x, samples.returns, samples).item() for x in (logs, uniform)]
    assert plain[1] - bonus[1] == pytest.approx(0.5 * math.log(2), rel=1e-5)  # a difference of float32 numbers
    assert plain[0] - bonus[0] < plain[1] - bonus[1]
    off = ppo.loss(game, logs, samples.returns + 3.0, samples).item()
    assert off - bonus[0] == pytest.approx(game.value * 9.0, rel=1e-5)  # likewise


@pytest.mark.parametrize(
    ("trained", "acts"), [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)]
)
def test_the_actor_computes_what_it_sees_in_16_bits(trained, acts):
    model, seen = network(trained, scale=100.0), torch.randn(50, 4)
    actor = acting.Actor(model, seed=0)
    actions, logs = actor.act(seen)
    with torch.no_grad():
        whole = network(trained, scale=100.0).policy.to(acts)(seen.to(acts)).float().log_softmax(-1)
    assert_same_bits("log-probabilities", logs, acting.of_actions(whole, actions))
    assert 0 < actions.sum() < 50
    frequencies = torch.stack([actor.act(seen[:1])[0] for _ in range(4000)]).float().mean()
    assert frequencies.item() == pytest.approx(whole[0, 1].exp().item(), abs=0.03)  # four deviations of 4,000 draws


def test_an_actor_follows_the_weights_when_it_is_told_to():
    model = network(torch.float32)
    actor, seen = acting.Actor(model, seed=0), torch.randn(8, 4)
    with torch.no_grad():
        model.policy[-1].bias.add_(torch.tensor([50.0, 0.0]))
    assert actor.act(seen)[0].any()
    actor.refresh(model)
    assert not actor.act(seen)[0].any()


def test_a_policy_that_is_not_finite_has_no_return_and_raises_nothing():
    model = network()
    assert 5 < acting.mean_return(GAME, model, 16) < 60
    with torch.no_grad():
        model.policy[0].weight[0, 0] = math.nan
    assert math.isnan(acting.mean_return(GAME, model, 16))


def test_the_mismatch_is_the_mean_distance_of_log_probabilities():
    seen = rollout()
    model = network().float()
    distances = model(seen.observations.flatten(0, 1))[0].gather(-1, seen.actions.view(-1, 1)).view(-1)
    expected = (distances - seen.acted.flatten()).abs().mean().item()
    assert 0 < seen.mismatch(model) == expected < 2**-8


def config(**given) -> RunConfig:
    return RunConfig.of("cartpole", "unused", **{"steps": 9, "every": 4, "eval_sequences": 3, "shadow": 16, **given})


def run(**given):
    rows = []
    return loops.run(config(**given), record=rows.append), rows


@pytest.mark.parametrize("strategy", ["collage-plus-sr", "collage-fp16"])
def test_a_run_is_a_function_of_its_settings(strategy):
    (first, rows), (again, told) = run(strategy=strategy), run(strategy=strategy)
    assert rows == told
    assert first.curve == again.curve
    for name, weight in first.weights.items():
        assert_same_bits(name, again.weights[name], weight)
    other, _ = run(strategy=strategy, seed=1)
    assert any(not torch.equal(other.weights[name], weight) for name, weight in first.weights.items())


def test_a_runs_records_and_result_say_what_every_runs_do_and_the_mismatch():
    result, rows = run(eval_every=4)
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("eval", 0), ("train", 1), ("train", 4), ("eval", 4), ("train", 8), ("eval", 8), ("eval", 9),
    ]  # fmt: skip
    evaluated = {row["step"]: row["score"] for row in rows if row["kind"] == "eval"}
    assert result.curve == {step: -score for step, score in evaluated.items()}
    assert (result.initial_score, result.score) == (evaluated[0], evaluated[9])
    assert (result.initial_loss, result.val_loss) == (-evaluated[0], -evaluated[9])
    first = rows[1]
    assert first["lr"] == config().lr
    assert 0.999 < first["edq_ratio"] <= 1.001
    assert 0 < first["mismatch"] < 2**-8
    assert first["grad_norm"] > 0
    assert result.report.total.v_ratio == pytest.approx(1.0, abs=0.01)  # bf16x2 beside float32
    assert result.optimizer_ms > 0 < result.tokens_per_s
    summary = result.to_dict()
    assert summary["mismatch"] == result.mismatch == pytest.approx(first["mismatch"])
    assert summary["bytes_per_param"] == 12.0


def test_strategies_begin_with_the_same_rollout():
    losses = {}
    for strategy in ("bf16", "collage-plus", "fp32-master", "fp32"):
        result, rows = run(strategy=strategy, steps=1, every=1)
        losses[strategy] = rows[1]["loss"], rows[1]["mismatch"], result.initial_score
    assert len(set(losses.values())) == 1


@pytest.mark.parametrize("strategy", ["collage-fp8", "fp8-master"])
def test_a_policy_of_e4m3_weights_is_trained(strategy):
    """Its first rollout is that of rounded weights: no mismatch of the optimizer's beyond what e4m3 cuts off."""
    result, rows = run(strategy=strategy)
    assert math.isfinite(result.score)
    assert 0 < rows[1]["mismatch"] < 2**-4
    assert result.weights["policy.0.weight"].dtype == torch.float32


def test_an_actor_follows_row_scales():
    model = fp8.convert(network())
    actor, scale = acting.Actor(model, seed=0), model.policy[0].weight_scale
    seen = torch.randn(8, 4)
    _, before = actor.act(seen)
    scale.add_(3)
    actor.refresh(model)
    _, after = actor.act(seen)
    assert not torch.equal(before, after)


def test_the_mismatch_is_of_the_weights_that_the_optimizer_holds(monkeypatch):
    """After the first rollout float32 masters hold more than the policy that acts sees; bf16 holds just that."""
    found = {}
    for strategy in ("bf16", "fp32-master"):
        result, rows = run(strategy=strategy, steps=17, every=17, lr=1e-4)
        found[strategy] = rows[-2]["mismatch"]
        assert rows[-2]["step"] == 17
        assert result.mismatch == pytest.approx((rows[1]["mismatch"] + rows[-2]["mismatch"]) / 2)
    assert found["fp32-master"] != found["bf16"]


def test_a_float16_policy_has_a_smaller_mismatch_than_a_bfloat16_one():
    """Three more bits of significand: about an eighth."""
    ratio = run(strategy="collage-fp16")[0].mismatch / run(strategy="collage-plus")[0].mismatch
    assert 1 / 32 < ratio < 1 / 3


def test_a_first_step_that_the_scaler_skips_leaves_no_state_unweighed():
    result, rows = run(strategy="collage-fp16", steps=9, every=1)
    assert rows[1]["edq_ratio"] is None  # 65,536 is too large a factor: nothing was stepped
    assert rows[-2]["edq_ratio"] is not None
    assert result.to_dict()["bytes_per_param"] == 10.0


def test_a_policy_that_is_lost_ends_the_run():
    result, _ = run(lr=1e30, every=1, steps=30)
    assert result.diverged
    assert result.last_step < 30
    assert math.isnan(result.score)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": ("x",)}, "data: 'cartpole' learns from the games it plays, not from text; leave it out"),
        ({"finetune": True}, "finetune: 'cartpole' learns from"),
        ({"save_every": 5}, "save_every: 'cartpole' plays in one process and keeps no checkpoints; leave it out"),
        ({"batch_size": 100}, "batch_size: 'cartpole' is trained on rollouts of 1024 moves; give a divisor of it"),
        ({"micro_batch": 64}, "micro_batch: 'cartpole' is trained on all moves of a step at once"),
        ({"seq_len": 3}, "seq_len: 'cartpole' observes 4 numbers; leave it out"),
    ],
)  # fmt: skip
def test_settings_of_text_are_refused(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        config(**given)


@pytest.mark.parametrize("command", ["compare --task rl", "train --model acrobot"])
def test_a_missing_gymnasium_is_one_sentence(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert main([*command.split(), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "needs the package gymnasium: install it with `pip install 'collage-optim[rl]'`" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
