#!/usr/bin/env perl
#
# A worker in Perl, with core modules only. It speaks goridge-3.
#
#   RR_RELAY   pipes (default) | tcp://HOST:PORT | unix:///PATH
#
# Three parts: (1) frames and relay, (2) handle(), which is the part to replace by your own code, (3) the main loop.

use 5.014;
use strict;
use warnings;
use Errno qw(EINTR);

# --- (1) frames and relay -------------------------------------------------------------------------------------------

use constant { CONTROL => 0x01, JSON => 0x08, ERROR => 0x40 };    # flags
use constant { MORE => 0x01, STOP => 0x02 };                      # stream bits

my ($in, $out) = open_relay($ENV{RR_RELAY} || 'pipes');
my @waiting;    # frames that came while we looked for a stop-the-stream frame

# Nothing on this relay can be trusted any more: say why and go, the pool starts another worker.
sub broken {
    print STDERR "worker: broken relay: @_\n";
    exit 1;
}

sub open_relay {
    my ($address) = @_;
    $SIG{PIPE} = sub { };    # a write to a pool that has gone shall fail, not kill us
    $| = 1;                  # a stray print goes out under the job that made it, not at some later time
    if ($address eq 'pipes') {
        binmode $_ for \*STDIN, \*STDOUT;    # sysread and syswrite refuse the :utf8 that PERL_UNICODE may have set
        return (\*STDIN, \*STDOUT);
    }
    my $socket;
    if ($address =~ m{^unix://(.+)$}s) {
        require IO::Socket::UNIX;
        $socket = IO::Socket::UNIX->new(Peer => $1);
    } elsif ($address =~ m{^tcp://\[?(.+?)\]?:(\d+)$}) {
        require IO::Socket::IP;
        require Socket;
        $socket = IO::Socket::IP->new(PeerHost => $1, PeerPort => $2);
        # Otherwise Nagle meets the peer's delayed ACK: 40 ms for each job.
        $socket->setsockopt(Socket::IPPROTO_TCP(), Socket::TCP_NODELAY(), 1) if $socket;
    }
    broken("$address:", $! || 'no such relay') unless $socket;
    return ($socket, $socket);
}

# Exactly $size bytes, or undef when the relay ended before the first of them. By sysread, which has no buffer: what is
# still in the pipe when we die was provably not begun, and select tells the truth.
sub read_exactly {
    my ($size) = @_;
    my $data = '';
    while (length $data < $size) {
        my $count = sysread $in, $data, $size - length $data, length $data;
        next if !defined $count && $! == EINTR;
        next if $count;
        broken('the end inside a frame') if length $data;
        return undef;
    }
    return $data;
}

sub write_all {
    my ($data) = @_;
    my $done = 0;
    while ($done < length $data) {
        my $count = syswrite $out, $data, length($data) - $done, $done;
        next if !defined $count && $! == EINTR;
        exit 0 unless $count;    # nobody is left to read it
        $done += $count;
    }
}

# By hand, as a bare perl-base comes without Compress::Zlib; only the six bytes of a header go through it.
my @CRC = map { my $c = $_; $c = $c & 1 ? 0xEDB88320 ^ $c >> 1 : $c >> 1 for 1 .. 8; $c } 0 .. 255;

sub crc32 {
    my $crc = 0xFFFFFFFF;
    $crc = $CRC[($crc ^ $_) & 0xFF] ^ $crc >> 8 for unpack 'C*', $_[0];
    return $crc ^ 0xFFFFFFFF;
}

# The next frame off the relay, or undef when the pool has gone.
sub read_frame {
    my $header = read_exactly(12);
    return undef unless defined $header;
    my ($first, $flags, $size, $crc, $stream, $reserved) = unpack 'C C V V C C', $header;
    my $words = $first & 0x0F;
    broken('no goridge-3 header:', unpack 'H*', $header)
        if $first >> 4 != 1 || $words < 3 || $words > 13 || $crc != crc32(substr $header, 0, 6);
    # The CRC leaves out the stream bits and the options. An error flag or "more follow" never comes from a pool.
    broken('illegal bits:', unpack 'H*', $header) if $flags & 0x42 || $stream & 0xF1 || $reserved;
    my $options = 4 * ($words - 3);
    my $rest = read_exactly($options + $size);
    broken('the end inside a frame') unless defined $rest;
    my $context_size = $options ? unpack('V', $rest) : 0;
    broken('the context is longer than the payload') if $context_size > $size;
    return {
        flags   => $flags,
        stream  => $stream,
        context => substr($rest, $options, $context_size),
        body    => substr($rest, $options + $context_size),
    };
}

# Header and payload in one write: a frame is one thing, on the wire as for the scheduler.
sub write_frame {
    my ($flags, $body, $context, $stream) = @_;
    my $option = defined $context ? pack('V', length $context) : '';
    my $payload = defined $context ? $context . $body : $body;
    my $start = pack 'C C V', 0x13 + (defined $context), $flags, length $payload;
    write_all($start . pack('V C C', crc32($start), $stream || 0, 0) . $option . $payload);
}

# Has the pool asked to stop the stream? Looks without blocking and keeps everything else for the main loop.
sub stop_asked {
    for (;;) {
        my $ready = '';
        vec($ready, fileno $in, 1) = 1;
        return 0 unless select($ready, undef, undef, 0) > 0;
        my $frame = read_frame() or exit 0;
        return 1 if $frame->{stream} & STOP;
        push @waiting, $frame if $frame->{stream} == 0;
    }
}

# --- (2) your code --------------------------------------------------------------------------------------------------

# Answers one job with (body, context), or with a function that gives one [body, context] at each call and undef at the
# end (a streamed reply). To die is a job error: the job failed, the worker is fine.
#
# This one takes the body as an instruction, which is what the tests need of a worker.
my %INSTRUCTIONS = (
    'upper *'  => sub { $_[0] =~ tr/a-z/A-Z/r },                  # not uc: bytes need not be text
    'fail'     => sub { die "told to fail\n" },
    'fail *'   => sub { die "$_[0]\n" },
    'stop'     => sub { ('', '{"stop":true}') },                  # "replace me": the job counts as not run
    'pid'      => sub { $$ },
    'slot'     => sub { $ENV{TRIO_WORKERS_SLOT} // '' },
    'exit *'   => sub { exit $_[0] },
    'kill'     => sub { kill KILL => $$; '' },
    'print'    => sub { print "hello from print\n"; 'printed' },  # the classic mistake: over pipes, stdout is the relay
    'stderr *' => sub { print STDERR "$_[0]\n"; 'ok' },
    'sleep *'  => sub { select undef, undef, undef, $_[0]; 'slept' },
    'stream *'      => sub { parts($_[0],    $_[1]) },
    'streamforever' => sub { parts(9**9**9,  $_[1]) },
    'streamfail *'  => sub { parts($_[0],    $_[1], "told to fail\n") },
);

sub handle {
    my ($body, $context) = @_;
    return ($body, $context) if $context eq 'echo';
    my ($word, $text) = split / /, $body, 2;
    my $instruction = $INSTRUCTIONS{defined $text ? "$word *" : $word // ''} or return ($body, $context);
    my ($reply, $other_context) = $instruction->($text, $context);
    return ($reply, $other_context // $context);
}

sub parts {
    my ($count, $context, $failure) = @_;
    my $i = 0;
    return sub {
        return ['part ' . $i++, $context] if $i < $count;
        die $failure if defined $failure;
        return undef;
    };
}

# --- (3) the main loop ----------------------------------------------------------------------------------------------

sub answer {
    my ($job) = @_;
    my $done = eval {
        my ($reply, $context) = handle($job->{body}, $job->{context});
        if (ref $reply eq 'CODE') {
            while (my $part = $reply->()) {
                last if stop_asked();
                write_frame(0, @$part, MORE);
            }
            ($reply, $context) = ('', '');    # the end of the stream, asked for or not
        }
        write_frame(0, $reply, $context);
        1;
    };
    return if $done;
    chomp(my $message = "$@");
    write_frame(ERROR, $message);
}

while (my $frame = shift(@waiting) || read_frame()) {
    if ($frame->{flags} & CONTROL) {
        last if $frame->{body} =~ /"stop"\s*:\s*true/;
        write_frame(CONTROL | JSON, qq({"pid":$$})) if $frame->{body} =~ /"pid"\s*:/;
    } elsif ($frame->{stream} == 0) {
        answer($frame);
    }    # else a pong, or a stop for a stream that has ended by itself: no job, and no harm
}
exit 0;
