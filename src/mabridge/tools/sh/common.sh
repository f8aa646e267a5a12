# What the file tools share. Nothing that the model chose is ever read as shell text: it all comes as arguments, which are
# PATH ROOT... -- and then those that each tool says.
# Answers are fields that each end in a NUL; the first one says what kind of answer it is.
LC_ALL=C TZ=UTC0
export LC_ALL TZ
set -f
nl='
'

say() { printf '%s\0' "$@"; }
fail() { say "$@"; exit 0; }

# canon PATH: sets $real to the absolute PATH with all symbolic links followed. Trailing components that do not exist
# are kept. Sets $after to how many components come after one that is not a directory, $err to why it cannot be done.
canon() {
  rest=$1 real='' err='' after=0 hops=0
  while [ -n "$rest" ]; do
    part=${rest%%/*}
    case $rest in */*) rest=${rest#*/} ;; *) rest='' ;; esac
    case $part in
      '' | .) continue ;;
      ..) real=${real%/*}; continue ;;
    esac
    if [ -d "$real/" ]; then
      [ -x "$real/" ] || { err='permission denied'; return; }
    elif [ -e "$real" ]; then
      after=1
    elif [ "$after" -gt 0 ]; then
      after=$((after + 1))
    fi
    if [ -L "$real/$part" ]; then
      hops=$((hops + 1))
      [ "$hops" -le 40 ] || { err='too many levels of symbolic links'; return; }
      link=$(readlink "$real/$part"; echo x)
      link=${link%"$nl"x}
      case $link in
        x) err='i/o error'; return ;;
        /*) real='' ;;
      esac
      rest=$link/$rest
    else
      real=$real/$part
    fi
  done
  real=${real:-/}
}

# resolve PATH ROOT... -- ARGUMENT...: sets $target to the canonical PATH, which must be inside a ROOT. A root is "w:DIR", or
# "r:DIR" for one that is only read; the first is the working directory. Sets $readonly to the "r:" root it is in, if any,
# and $taken to how many arguments there are up to the "--".
resolve() {
  path=$1
  shift
  canon "${1#??}"
  case $path in
    /*) ;;
    *)
      base=$real
      while case $path in .. | ../*) true ;; *) false ;; esac; do
        base=${base%/*} path=${path#..}
        path=${path#/}
      done
      path=$base/$path
      ;;
  esac
  canon "$path"
  [ -z "$err" ] || fail path "$err"
  target=$real beyond=$after inside='' readonly='' taken=2
  for root; do
    [ "$root" != -- ] || break
    taken=$((taken + 1))
    canon "${root#??}"
    [ -z "$err" ] || continue
    case $target/ in
      "${real%/}"/*)
        inside=1
        case $root in r:*) readonly=${root#??} ;; esac
        ;;
    esac
  done
  [ -n "$inside" ] || fail outside
}

# absent: says why $target does not exist.
absent() {
  [ "$beyond" -eq 0 ] || fail error 'not a directory'
  fail error 'no such file or directory'
}

# measure FILE: sets $stamp, which changes whenever the file does, and $size and $links from it.
measure() {
  stamp=$(stat -c '%s %h %i %y %z' -- "$1" 2>/dev/null) || stamp="$(($(wc -c <"$1"))) 1"
  size=${stamp%% *}
  links=${stamp#* } links=${links%% *}
}
