<?php
/*
 * A worker in PHP 8.1 or later, without any package. It speaks all three goridge dialects:
 *
 *   RR_RELAY                pipes (default) | tcp://HOST:PORT | unix:///PATH
 *   TRIO_WORKERS_PROTOCOL   goridge-1 | goridge-2 | goridge-3 (default)
 *
 * Three parts: (1) frames and relay, (2) handle(), which is the part to replace by your own code, (3) the main loop.
 */
declare(strict_types=1);

// Warnings belong on stderr: on stdout they would be read as frames. Inside a job they become a job error.
ini_set('display_errors', 'stderr');
set_error_handler(static function (int $level, string $message, string $file, int $line): bool {
    return (error_reporting() & $level) === 0 ? true : throw new ErrorException($message, 0, $level, $file, $line);
});

// --- (1) frames and relay -------------------------------------------------------------------------------------------

/** What the pool said; `kind` is one of control, job, stop-stream, ignore. */
final class Message
{
    public function __construct(
        public readonly string $kind,
        public readonly string $body = '',
        public readonly string $context = '',
    ) {
    }
}

/** Nothing on this relay can be trusted any more: say why and go, the pool starts another worker. */
function broken(string $why): never
{
    fwrite(STDERR, "worker: broken relay: $why\n");
    exit(1);
}

final class Relay
{
    /** @var resource */
    private $in;
    /** @var resource */
    private $out;
    /** @var list<Message> what came while we looked for a stop-the-stream frame */
    private array $waiting = [];

    public function __construct(private readonly string $protocol, string $address)
    {
        in_array($protocol, ['goridge-1', 'goridge-2', 'goridge-3'], true) || broken("no such protocol: $protocol");
        // PHP gives up reading any socket after 60 s (a socketpair on stdin is one too); a worker may idle for hours.
        ini_set('default_socket_timeout', '-1');
        if ($address === 'pipes') {
            // php://stdin, not /dev/stdin: a socketpair cannot be opened by a path.
            $this->in = fopen('php://stdin', 'rb');
            $this->out = fopen('php://stdout', 'wb');
        } else {
            // Without TCP_NODELAY, Nagle meets the peer's delayed ACK: 40 ms for each job. Unix sockets take no notice.
            $options = stream_context_create(['socket' => ['tcp_nodelay' => true]]);
            $socket = @stream_socket_client($address, $code, $why, 10.0, STREAM_CLIENT_CONNECT, $options);
            $this->in = $this->out = $socket ?: broken("$address: $why");
        }
        // Without PHP's own buffer we take what belongs to this job and no more. What is still in the pipe when we die
        // was provably not begun, and stream_select() tells the truth.
        stream_set_read_buffer($this->in, 0);
        stream_set_blocking($this->in, true);
        stream_set_blocking($this->out, true);
    }

    public function canStream(): bool
    {
        return $this->protocol === 'goridge-3';
    }

    /** The next message, or null when the pool has gone. */
    public function receive(): ?Message
    {
        return array_shift($this->waiting) ?? $this->next();
    }

    public function control(string $json): void
    {
        $this->write($this->canStream() ? $this->frame3(0x09, $json) : $this->frameOld(0x10, $json));
    }

    public function error(string $message): void
    {
        $this->write($this->canStream() ? $this->frame3(0x40, $message) : $this->frameOld(0x1c, $message));
    }

    /** A reply; with $more, a part of a streamed reply after which others follow. */
    public function reply(string $body, string $context, bool $more = false): void
    {
        if ($this->canStream()) {
            $this->write($this->frame3(0x00, $context . $body, strlen($context), $more ? 0x01 : 0x00));
        } else {
            // Two frames, one write: for the packet as for the scheduler a reply is one thing.
            $head = $context === '' ? $this->frameOld(0x12, '') : $this->frameOld(0x14, $context);
            $this->write($head . $this->frameOld(0x04, $body));
        }
    }

    /** Has the pool asked to stop the stream? Looks without blocking and keeps everything else for receive(). */
    public function stopAsked(): bool
    {
        for (;;) {
            $read = [$this->in];
            $write = $except = null;
            if (stream_select($read, $write, $except, 0) === 0) {
                return false;
            }
            $message = $this->next() ?? exit(0);
            if ($message->kind === 'stop-stream') {
                return true;
            }
            if ($message->kind !== 'ignore') {
                $this->waiting[] = $message;
            }
        }
    }

    private function next(): ?Message
    {
        return $this->canStream() ? $this->next3() : $this->nextOld();
    }

    private function next3(): ?Message
    {
        $header = $this->read(12);
        if ($header === null) {
            return null;
        }
        $h = unpack('Cfirst/Cflags/Vsize/Vcrc/Cstream/Creserved', $header);
        $options = ($h['first'] & 0x0f) - 3;
        if ($h['first'] >> 4 !== 1 || $options < 0 || $options > 10 || $h['crc'] !== crc32(substr($header, 0, 6))) {
            broken('no goridge-3 header: ' . bin2hex($header));
        }
        // The CRC leaves out the stream bits and the options. An error flag or "more follow" never comes from a pool.
        if ($h['flags'] & 0x42 || $h['stream'] & 0xf1 || $h['reserved']) {
            broken('illegal bits: ' . bin2hex($header));
        }
        $rest = $this->read(4 * $options + $h['size']) ?? broken('the end inside a frame');
        $contextSize = $options > 0 ? unpack('V', $rest)[1] : 0;
        if ($contextSize > $h['size']) {
            broken('the context is longer than the payload');
        }
        return match (true) {
            ($h['flags'] & 0x01) !== 0 => new Message('control', substr($rest, 4 * $options)),
            ($h['stream'] & 0x02) !== 0 => new Message('stop-stream'),
            $h['stream'] !== 0 => new Message('ignore'),
            default => new Message(
                'job',
                substr($rest, 4 * $options + $contextSize),
                substr($rest, 4 * $options, $contextSize),
            ),
        };
    }

    private function nextOld(): ?Message
    {
        [$prefix, $format] = $this->protocol === 'goridge-1' ? [9, 'Cflags/Psize'] : [17, 'Cflags/Psize/Jagain'];
        $context = null;
        for (;;) {
            $header = $this->read($prefix);
            if ($header === null) {
                return $context === null ? null : broken('the end inside a job');
            }
            $h = unpack($format, $header);
            ['flags' => $flags, 'size' => $size] = $h;
            if ($flags & ~0x16 || $size < 0 || $size !== ($h['again'] ?? $size) || ($flags & 0x02 && $size)) {
                broken("no {$this->protocol} header: " . bin2hex($header));
            }
            $payload = $this->read($size) ?? broken('the end inside a frame');
            if (!($flags & 0x10)) {
                return new Message('job', $payload, $context ?? '');
            }
            if (!($flags & 0x04) && $size > 0) {
                return new Message('control', $payload);
            }
            $context = $payload; // a job is two frames, and its body is the next one
        }
    }

    private function frame3(int $flags, string $payload, ?int $contextSize = null, int $stream = 0): string
    {
        $option = $contextSize === null ? '' : pack('V', $contextSize);
        $start = pack('CCV', $option === '' ? 0x13 : 0x14, $flags, strlen($payload));
        return $start . pack('VCC', crc32($start), $stream, 0) . $option . $payload;
    }

    private function frameOld(int $flags, string $payload): string
    {
        $size = strlen($payload);
        $prefix = $this->protocol === 'goridge-1' ? pack('CP', $flags, $size) : pack('CPJ', $flags, $size, $size);
        return $prefix . $payload;
    }

    /** Exactly $size bytes, or null when the relay ended before the first of them. */
    private function read(int $size): ?string
    {
        $data = '';
        while (($missing = $size - strlen($data)) > 0) {
            // In steps, as fread() allocates what it is asked for: memory grows with what came, not with a promise.
            $chunk = @fread($this->in, min($missing, 1 << 20));
            if ($chunk === false || $chunk === '') {
                return $data === '' ? null : broken('the end inside a frame');
            }
            $data .= $chunk;
        }
        return $data;
    }

    private function write(string $data): void
    {
        while ($data !== '') {
            $count = @fwrite($this->out, $data);
            if ($count === false || $count === 0) {
                exit(0); // nobody is left to read it
            }
            $data = $count === strlen($data) ? '' : substr($data, $count);
        }
    }
}

// --- (2) your code --------------------------------------------------------------------------------------------------

/**
 * Answers one job with [body, context], or with a generator of these (a streamed reply, goridge-3 only).
 * Whatever is thrown becomes a job error: the job failed, the worker is fine.
 *
 * This one takes the body as an instruction, which is what the tests need of a worker.
 *
 * @return array{string, string}|Generator<array{string, string}>
 */
function handle(string $body, string $context): array|Generator
{
    if ($context === 'echo') {
        return [$body, $context];
    }
    [$word, $text] = explode(' ', $body, 2) + ['', null];
    switch ($text === null ? $word : "$word *") {
        case 'upper *':
            return [strtoupper($text), $context];
        case 'fail':
            throw new RuntimeException('told to fail');
        case 'fail *':
            throw new RuntimeException($text);
        case 'stop':
            return ['', '{"stop":true}']; // "replace me": the job counts as not run, another worker gets it
        case 'pid':
            return [(string) getmypid(), $context];
        case 'slot':
            return [(string) getenv('TRIO_WORKERS_SLOT'), $context];
        case 'exit *':
            exit((int) $text);
        case 'kill':
            posix_kill(getmypid(), 9);
            break;
        case 'print':
            echo "hello from print\n"; // the classic mistake: over pipes, stdout is the relay
            return ['printed', $context];
        case 'stderr *':
            fwrite(STDERR, "$text\n");
            return ['ok', $context];
        case 'sleep *':
            usleep((int) ((float) $text * 1e6));
            return ['slept', $context];
        case 'stream *':
            return parts((int) $text, $context);
        case 'streamforever':
            return parts(PHP_INT_MAX, $context);
        case 'streamfail *':
            return parts((int) $text, $context, 'told to fail');
    }
    return [$body, $context];
}

/** @return Generator<array{string, string}> */
function parts(int $count, string $context, ?string $failure = null): Generator
{
    for ($i = 0; $i < $count; ++$i) {
        yield ["part $i", $context];
    }
    if ($failure !== null) {
        throw new RuntimeException($failure);
    }
}

// --- (3) the main loop ----------------------------------------------------------------------------------------------

function answer(Relay $relay, Message $job): void
{
    try {
        $reply = handle($job->body, $job->context);
        if (!$reply instanceof Generator) {
            $relay->reply(...$reply);
            return;
        }
        if (!$relay->canStream()) {
            throw new LogicException('streams need goridge-3');
        }
        foreach ($reply as [$body, $context]) {
            if ($relay->stopAsked()) {
                break;
            }
            $relay->reply($body, $context, more: true);
        }
        $relay->reply('', ''); // the end of the stream, asked for or not
    } catch (Throwable $error) {
        $relay->error($error->getMessage());
    }
}

$relay = new Relay(getenv('TRIO_WORKERS_PROTOCOL') ?: 'goridge-3', getenv('RR_RELAY') ?: 'pipes');
while (($message = $relay->receive()) !== null) {
    if ($message->kind === 'job') {
        answer($relay, $message);
    } elseif ($message->kind === 'control') {
        $command = json_decode($message->body, true) ?? broken("no JSON: {$message->body}");
        if (isset($command['stop'])) {
            break;
        }
        if (isset($command['pid'])) {
            $relay->control(sprintf('{"pid":%d}', getmypid()));
        }
    } // else a pong, or a stop for a stream that has ended by itself: no job, and no harm
}
exit(0);
