"""What the batch shell does at the start of each life of a job, before the first step: signal, dead ends, breaker.

    RUN/registry/JOB.RESTART/       one folder for each life: STOP, REASON and the records of the services
    RUN/registry/progress.JOB       step of the newest checkpoint when the last life began, and for how many lives it has been that

A plain ``exit`` here ends the job without another requeue; a step that ends with anything but 0 leads to the next life, for
which nemo-run's script asks ``scontrol`` at its end: here a function, which asks for none where it would end in the same way,
and asks again where no controller answers. None either where Slurm has given up this node, and so has started the job already:
what would be ended is the life that took over. Whoever was killed has left no reason, so the exit code of its step is given as
one. A shared folder that is full or read-only for a while is waited for, at the start of a life and before another is asked for.

    what the life before left       what this one does
    REASON fatal ...                ends with 1: it would end in the same way (Slurm itself has started it, after a lost node)
    STOP with ``end`` in it         ends with 0: somebody wants the run to end, and it was lost before it could
    no new checkpoint, N times      ends with 1
    anything else                   goes on
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

_TEXT = r"""
ulimit -c 0
distil_run=@RUN@
distil_roles=(@ROLES@)
distil_restart=${SLURM_RESTART_COUNT:-0}
distil_life=$distil_run/registry/$SLURM_JOB_ID.$distil_restart
distil_write() { # when this life began or ended, as soon as the shared folder takes it
  for distil_try in $(seq 60); do
    if mkdir -p "$distil_life" && date >"$distil_life/$1"; then return 0; fi
    echo "distil: $distil_life cannot be written, try $distil_try of 60"
    sleep 10
  done
  return 1
}
distil_write began || exit 1
trap 'echo "distil: the time limit is near, the run saves and ends"; touch "$distil_life/STOP"' USR1

scontrol() {
  if [ "$1" != requeue ]; then
    command scontrol "$@"
    return
  fi
  # Slurm opens the output of the next life in the same folder, and gives the job up where it cannot
  distil_write ended || true
  distil_tries=$distil_try
  case $(cat "$distil_life/REASON" 2>/dev/null) in
    "" | "stopped by SIGTERM"*) # as those are that are ended for the sake of another one
      # pids, pid and exitcode are those of nemo-run's script: its steps, and the one that ended first
      distil_role="a step"
      for distil_index in "${!pids[@]}"; do
        if [ "${pids[distil_index]}" = "$pid" ]; then distil_role=${distil_roles[distil_index]}; fi
      done
      distil_reason="failed $distil_role ended with exit code $exitcode, and nobody said why"
      if [ "$distil_tries" -gt 1 ]; then distil_reason="failed the shared folder could not be written"; fi
      echo "$distil_reason" >"$distil_life/REASON" || true
      ;;
    fatal*)
      echo "distil: another life would end as this one did"
      return 0
      ;;
    stopped*) # a node that meets another one's end, as its store is gone, ends with an error although all is saved
      if [ "$(cat "$distil_life/STOP" 2>/dev/null)" = end ]; then
        echo "distil: the run was asked to end"
        exit 0
      fi
      ;;
  esac
  for distil_try in $(seq 60); do
    distil_count=$(command scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p')
    if [ "${distil_count:-0}" -gt "$distil_restart" ]; then
      echo "distil: Slurm has started the job again by itself"
      return 0
    fi
    if command scontrol "$@"; then return 0; fi
    echo "distil: no requeue, try $distil_try of 60"
    sleep 10
  done
  return 1
}

distil_before=$distil_run/registry/$SLURM_JOB_ID.$((distil_restart - 1))
distil_reason=$(cat "$distil_before/REASON" 2>/dev/null)
case $distil_reason in
  fatal*)
    echo "distil: another life would end as the last one did: $distil_reason"
    echo "$distil_reason" >"$distil_life/REASON"
    exit 1
    ;;
esac
if [ "$(cat "$distil_before/STOP" 2>/dev/null)" = end ]; then
  echo "distil: the run was asked to end"
  echo "stopped it was asked to end" >"$distil_life/REASON"
  exit 0
fi

distil_step=none
for distil_file in "$distil_run"/checkpoints/step_*/COMPLETE; do
  if [ -e "$distil_file" ]; then distil_step=$(basename "$(dirname "$distil_file")"); fi
done
distil_last= distil_same=0
read -r distil_last distil_same 2>/dev/null <"$distil_run/registry/progress.$SLURM_JOB_ID" || true
if [ "$distil_step" = "$distil_last" ]; then distil_same=$((distil_same + 1)); else distil_same=0; fi
echo "$distil_step $distil_same" >"$distil_run/registry/progress.$SLURM_JOB_ID"
if [ "$distil_same" -ge @MAX_SAME@ ]; then
  distil_reason="fatal no progress: the newest checkpoint is $distil_step since $distil_same lives"
  echo "distil: $distil_reason"
  echo "$distil_reason" >"$distil_life/REASON"
  exit 1
fi
"""


def setup_text(run: str, roles: Sequence[str], *, max_lives_without_progress: int) -> str:
    """Shell text for the batch script of a job.

    Args:
        run: the run directory.
        roles: names of its steps, in their order.
        max_lives_without_progress: after so many lives without a new checkpoint the job ends.
    """
    words = {"@RUN@": shlex.quote(run), "@ROLES@": shlex.join(roles), "@MAX_SAME@": str(max_lives_without_progress)}
    text = _TEXT
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text
