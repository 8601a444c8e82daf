"""The scripts for bash and zsh, which share functions that say what may be typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clicktrain.cli import COMMANDS
from clicktrain.commands.bench import BENCHMARKS
from clicktrain.commands.shells.table import DEFAULT_METHOD, Place, Value

_SHARED = """\
# Flags of a place: COMMAND, train/METHOD or bench/BENCHMARK.
_clicktrain_flags() {
  case "$1" in
@FLAGS@
  esac
}

# What follows a flag, or is an argument where none is named: words, @file or @folder.
_clicktrain_values() {
  case "$1 $2" in
@VALUES@
  esac
}

# The place that the words of a line lead to.
_clicktrain_place() {
  local command="$1" found="@METHOD@" before="" word=""
  shift
  case "$command" in
    train)
      for word in "$@"; do
        case "$word" in
          =) continue ;;
          --method=*) found="${word#--method=}" ;;
        esac
        case "$before" in --method) found="$word" ;; esac
        before="$word"
      done
      echo "train/$found" ;;
    bench)
      for word in "$@"; do
        case "$word" in @BENCHMARKS@) echo "bench/$word"; return ;; esac
      done
      echo bench ;;
    *) echo "$command" ;;
  esac
}
"""

_BASH = """\
# bash completion of clicktrain, for ~/.local/share/bash-completion/completions/clicktrain
@SHARED@
_clicktrain() {
  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" place="" said=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "@COMMANDS@" -- "$current"))
    return
  fi
  # bash cuts --flag=value into three words.
  if [ "$current" = "=" ]; then current=""; fi
  if [ "$previous" = "=" ]; then previous="${COMP_WORDS[COMP_CWORD-2]}"; fi
  place="$(_clicktrain_place "${COMP_WORDS[@]:1:COMP_CWORD-1}")"
  case "$current" in
    -*)
      COMPREPLY=($(compgen -W "$(_clicktrain_flags "$place")" -- "$current"))
      return ;;
  esac
  case "$previous" in -*) said="$(_clicktrain_values "$place" "$previous")" ;; esac
  [ -n "$said" ] || said="$(_clicktrain_values "$place" "")"
  case "$said" in
    @folder|@file)
      compopt -o filenames 2>/dev/null
      local kind=-f IFS=$'\\n'
      [ "$said" = @folder ] && kind=-d
      COMPREPLY=($(compgen "$kind" -- "$current")) ;;
    *) COMPREPLY=($(compgen -W "$said" -- "$current")) ;;
  esac
}
complete -F _clicktrain clicktrain
"""

_ZSH = """\
#compdef clicktrain
# zsh completion of clicktrain, for a folder of $fpath, as _clicktrain
@SHARED@
_clicktrain() {
  local place said previous
  local -a found
  if (( CURRENT == 2 )); then
    found=(@COMMANDS@)
    _describe command found
    return
  fi
  previous="${words[CURRENT-1]}"
  place="$(_clicktrain_place "${(@)words[2,CURRENT-1]}")"
  if [[ "${words[CURRENT]}" == -* ]]; then
    found=("${(@f)$(_clicktrain_flags "$place")}")
    _describe flag found
    return
  fi
  [[ "$previous" == -* ]] && said="$(_clicktrain_values "$place" "$previous")"
  [[ -n "$said" ]] || said="$(_clicktrain_values "$place" "")"
  case "$said" in
    @folder) _files -/ ;;
    @file) _files ;;
    ?*) compadd -- ${=said} ;;
  esac
}
# Loaded from $fpath the file is the function; sourced, it only registers it.
if [ "$funcstack[1]" = "_clicktrain" ]; then
  _clicktrain "$@"
else
  compdef _clicktrain clicktrain
fi
"""


def bash_script(places: Sequence[Place]) -> str:
    """The script for bash."""
    flags = _flags(places, lambda place: f"echo {_quoted(' '.join(place.words))}")
    commands = " ".join((*COMMANDS, "--help", "--version"))
    return _filled(_BASH, SHARED=_shared(places, flags), COMMANDS=commands)


def zsh_script(places: Sequence[Place]) -> str:
    """The script for zsh, which shows what flags are for."""

    def described(place: Place) -> str:
        return "print -rl -- " + " ".join(_quoted(f"{word}:{what}") for word, what in place.words.items())

    commands = " ".join(_quoted(f"{name}:{what}") for name, what in COMMANDS.items())
    return _filled(_ZSH, SHARED=_shared(places, _flags(places, described)), COMMANDS=commands)


def _flags(places: Sequence[Place], command: Callable[[Place], str]) -> str:
    return "\n".join(f"    '{place.name}') {command(place)} ;;" for place in places)


def _shared(places: Sequence[Place], flags: str) -> str:
    values = "\n".join(
        f"    {' | '.join(patterns)}) echo {_quoted(said)} ;;" for said, patterns in _values(places).items()
    )
    benchmarks = "|".join(BENCHMARKS)
    return _filled(_SHARED, FLAGS=flags, VALUES=values, METHOD=DEFAULT_METHOD, BENCHMARKS=benchmarks)


def _values(places: Sequence[Place]) -> dict[str, list[str]]:
    """What may follow -> patterns of "PLACE FLAG", with no flag for an argument.

    Where all places of a command agree about a flag, as all methods do about those of the run, it is
    ``COMMAND/* FLAG``.
    """
    said: dict[tuple[str, str], dict[str, str]] = {}
    for place in places:
        for one in place.flags:
            for flag in filter(None, (one.flag, one.short)):
                said.setdefault((place.command, flag), {})[place.name] = _said(one.value)
        if place.argument is not None:
            said.setdefault((place.command, ""), {})[place.name] = _said(place.argument)
    found: dict[str, list[str]] = {}
    for (command, flag), by_place in said.items():
        texts = set(by_place.values())
        names = [f"{command}/*"] if len(texts) == 1 and len(by_place) > 1 else list(by_place)
        for name, text in zip(names, by_place.values(), strict=False):
            if text:
                found.setdefault(text, []).append(f"'{name} {flag}'".replace("*", "'*'"))
    return found


def _said(value: Value) -> str:
    paths = {"file": "@file", "folder": "@folder"}
    return " ".join(value.words) if value.kind == "words" else paths.get(value.kind, "")


def _filled(text: str, **parts: str) -> str:
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _quoted(text: str) -> str:
    """A word of a Bourne shell."""
    return "'" + text.replace("'", "'\\''") + "'"
