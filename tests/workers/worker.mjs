#!/usr/bin/env node
/*
 * A worker in Node.js, without any package. It speaks goridge-3.
 *
 *   RR_RELAY   pipes (default) | tcp://HOST:PORT | unix:///PATH
 *
 * Three parts: (1) frames and relay, (2) handle(), which is the part to replace by your own code, (3) the main loop.
 * It is driven by events, as Node has no blocking sockets: one code for all relays, and handle() may await.
 */
import { once } from "node:events";
import net from "node:net";
import { setImmediate as turn, setTimeout as sleep } from "node:timers/promises";

// --- (1) frames and relay ------------------------------------------------------------------------------------------

const CONTROL = 0x01, JSON_CODEC = 0x08, ERROR = 0x40; // flags
const MORE = 0x01, STOP = 0x02; // stream bits

/** Nothing on this relay can be trusted any more: say why and go, the pool starts another worker. */
function broken(why) {
  process.stderr.write(`worker: broken relay: ${why}\n`);
  process.exit(1);
}

function crc32(bytes) {
  // Bit by bit is fast enough for the six bytes of a header (and zlib.crc32 is too new to count on).
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

class Relay {
  #in;
  #out;
  #header = null; // of a frame whose rest has not come yet
  #waiting = []; // frames that came while we looked for a stop-the-stream frame
  #wake = () => {};

  constructor(input, output) {
    this.#in = input;
    this.#out = output;
    for (const event of ["readable", "end"]) input.on(event, () => this.#wake());
    // A reset or a broken pipe: the pool has gone, which is no fault of ours.
    for (const stream of new Set([input, output])) stream.on("error", () => process.exit(0));
  }

  static async open(address) {
    if (address === "pipes") return new Relay(process.stdin, process.stdout);
    const [, scheme, rest] = /^(tcp|unix):\/\/(.+)$/.exec(address) ?? broken(`no such relay: ${address}`);
    const [, host, port] = /^\[?(.*?)\]?:(\d+)$/.exec(rest) ?? [];
    // Without noDelay, Nagle meets the peer's delayed ACK: 40 ms for each job.
    const socket = net.connect(scheme === "unix" ? { path: rest } : { host, port: Number(port), noDelay: true });
    await once(socket, "connect").catch((error) => broken(`${address}: ${error.message}`));
    return new Relay(socket, socket);
  }

  /** The next frame, or null when the pool has gone. */
  async receive() {
    for (;;) {
      const frame = this.#waiting.shift() ?? this.#take();
      if (frame) return frame;
      if (this.#in.readableEnded) return this.#header ? broken("the end inside a frame") : null;
      await new Promise((resolve) => { this.#wake = resolve; });
    }
  }

  /** Has the pool asked to stop the stream? Keeps everything else for receive(). */
  stopAsked() {
    for (let frame; (frame = this.#take()); ) {
      if (frame.stream & STOP) return true;
      if (frame.stream === 0) this.#waiting.push(frame);
    }
    if (this.#in.readableEnded) process.exit(0); // nobody is left to stream to
    return false;
  }

  control(value) {
    return this.#write(CONTROL | JSON_CODEC, JSON.stringify(value));
  }

  error(message) {
    return this.#write(ERROR, message);
  }

  /** A reply; with `more`, a part of a streamed reply after which others follow. */
  reply({ body = "", context = "", more = false }) {
    return this.#write(0, body, Buffer.from(context), more ? MORE : 0);
  }

  /** A frame if all of it is here. read(n) answers null until there are n bytes, or fewer before the end. */
  #take() {
    if (!this.#header) {
      const h = this.#in.read(12);
      if (!h) return null;
      if (h.length < 12) broken("the end inside a header");
      const words = h[0] & 0x0f;
      if (h[0] >> 4 !== 1 || words < 3 || words > 13 || h.readUInt32LE(6) !== crc32(h.subarray(0, 6))) {
        broken(`no goridge-3 header: ${h.toString("hex")}`);
      }
      // The CRC leaves out the stream bits and the options. An error flag or "more follow" never comes from a pool.
      if (h[1] & 0x42 || h[10] & 0xf1 || h[11]) broken(`illegal bits: ${h.toString("hex")}`);
      this.#header = { flags: h[1], stream: h[10], options: 4 * (words - 3), size: h.readUInt32LE(2) };
    }
    const { flags, stream, options, size } = this.#header;
    const rest = options + size ? this.#in.read(options + size) : Buffer.alloc(0);
    if (!rest) return null;
    if (rest.length < options + size) broken("the end inside a frame");
    this.#header = null;
    const contextSize = options ? rest.readUInt32LE(0) : 0;
    if (contextSize > size) broken("the context is longer than the payload");
    const start = options + contextSize;
    return { flags, stream, context: rest.subarray(options, start), body: rest.subarray(start) };
  }

  /** Write one frame in one piece, and wait until the kernel has it: this is the backpressure. */
  #write(flags, body, context = null, stream = 0) {
    const payload = Buffer.from(body);
    const header = Buffer.alloc(context ? 16 : 12);
    header[0] = context ? 0x14 : 0x13;
    header[1] = flags;
    header.writeUInt32LE((context?.length ?? 0) + payload.length, 2);
    header.writeUInt32LE(crc32(header.subarray(0, 6)), 6);
    header[10] = stream;
    if (context) header.writeUInt32LE(context.length, 12);
    const frame = Buffer.concat(context ? [header, context, payload] : [header, payload]);
    return new Promise((resolve) => this.#out.write(frame, resolve));
  }
}

// --- (2) your code -------------------------------------------------------------------------------------------------

/**
 * Answer one job with { body, context } (strings or buffers), or with an async generator of these (a streamed reply).
 * Whatever is thrown becomes a job error: the job failed, the worker is fine.
 *
 * This one takes the body as an instruction, which is what the tests need of a worker.
 */
async function handle(body, context) {
  if (context.equals(Buffer.from("echo"))) return { body, context };
  const space = body.indexOf(" ");
  const word = body.toString("latin1", 0, space < 0 ? body.length : space);
  const text = body.subarray(space + 1);
  switch (space < 0 ? word : `${word} *`) {
    case "upper *": // bytes, which need not be text
      return { body: text.map((c) => (c >= 97 && c <= 122 ? c - 32 : c)), context };
    case "fail":
      throw new Error("told to fail");
    case "fail *":
      throw new Error(text.toString());
    case "stop":
      return { context: '{"stop":true}' }; // "replace me": the job counts as not run, another worker gets it
    case "pid":
      return { body: String(process.pid), context };
    case "slot":
      return { body: process.env.TRIO_WORKERS_SLOT ?? "", context };
    case "exit *":
      process.exit(Number(text));
    case "kill":
      process.kill(process.pid, "SIGKILL");
      break;
    case "print":
      console.log("hello from print"); // the classic mistake: over pipes, stdout is the relay
      return { body: "printed", context };
    case "stderr *":
      console.error(text.toString());
      return { body: "ok", context };
    case "sleep *":
      await sleep(1000 * Number(text));
      return { body: "slept", context };
    case "stream *":
      return parts(Number(text), context);
    case "streamforever":
      return parts(Infinity, context);
    case "streamfail *":
      return parts(Number(text), context, "told to fail");
  }
  return { body, context };
}

async function* parts(count, context, failure = null) {
  for (let i = 0; i < count; i++) yield { body: `part ${i}`, context };
  if (failure) throw new Error(failure);
}

// --- (3) the main loop ---------------------------------------------------------------------------------------------

async function answer(relay, job) {
  try {
    const reply = await handle(job.body, job.context);
    if (!reply[Symbol.asyncIterator]) return await relay.reply(reply);
    for await (const part of reply) {
      await turn(); // lets a stop-the-stream frame come in
      if (relay.stopAsked()) break;
      await relay.reply({ ...part, more: true });
    }
    await relay.reply({}); // the end of the stream, asked for or not
  } catch (error) {
    await relay.error(error instanceof Error ? error.message : String(error));
  }
}

const relay = await Relay.open(process.env.RR_RELAY || "pipes");
for (let frame; (frame = await relay.receive()); ) {
  if (frame.flags & CONTROL) {
    let command;
    try {
      command = JSON.parse(frame.body);
    } catch {
      broken(`no JSON: ${frame.body}`);
    }
    if (command.stop) break;
    if (command.pid) await relay.control({ pid: process.pid });
  } else if (frame.stream === 0) {
    await answer(relay, frame);
  } // else a pong, or a stop for a stream that has ended by itself: no job, and no harm
}
process.exit(0); // at once: whatever a handler left open must not keep the process alive
