import {spawn, spawnSync, type ChildProcess} from 'node:child_process';
import {setTimeout as sleep} from 'node:timers/promises';

export interface Result {
	readonly code: number | null;
	readonly stdout: string;
	readonly stderr: string;
}

/** Runs to the end. Never throws for an exit code. */
export function run(command: string, args: readonly string[], options: {readonly input?: string; readonly timeoutMs?: number; readonly env?: NodeJS.ProcessEnv; readonly cwd?: string} = {}): Result {
	const {input = '', timeoutMs: timeout = 60_000, ...rest} = options;
	const {status, stdout, stderr, error} = spawnSync(command, args, {encoding: 'utf8', input, timeout, maxBuffer: 1 << 28, ...rest});
	if (error) {
		throw new Error(`${command} ${args.join(' ')}: ${error.message}`);
	}

	return {code: status, stdout, stderr};
}

/** Runs to the end, and has to succeed. */
export function must(command: string, ...args: readonly string[]): string {
	const {code, stdout, stderr} = run(command, args);
	if (code !== 0) {
		throw new Error(`${command} ${args.join(' ')} ended with ${code}: ${stderr}${stdout}`);
	}

	return stdout;
}

/** A program in the background, with what it says. */
export class Running {
	stdout = '';
	stderr = '';
	readonly ended: Promise<number | null>;

	constructor(readonly child: ChildProcess, readonly title: string) {
		child.stdout?.setEncoding('utf8').on('data', (text: string) => {
			this.stdout += text;
		});
		child.stderr?.setEncoding('utf8').on('data', (text: string) => {
			this.stderr += text;
		});
		this.ended = new Promise(resolve => {
			child.once('close', code => {
				resolve(code);
			});
		});
	}

	static start(command: string, args: readonly string[]): Running {
		return new Running(spawn(command, args, {stdio: ['pipe', 'pipe', 'pipe']}), `${command} ${args.join(' ')}`);
	}

	get hasEnded(): boolean {
		return this.child.exitCode !== null || this.child.signalCode !== null;
	}

	/** JSON lines on stdout so far. */
	lines<T>(): T[] {
		const whole = this.stdout.slice(0, this.stdout.lastIndexOf('\n') + 1);
		return whole.split('\n').filter(Boolean).map(line => JSON.parse(line) as T);
	}

	async until(what: string, test: () => boolean, timeoutMs = 45_000): Promise<void> {
		const deadline = Date.now() + timeoutMs;
		while (!test()) {
			if (this.hasEnded || Date.now() > deadline) {
				throw new Error(`${this.title} ${this.hasEnded ? `ended (${this.child.exitCode ?? this.child.signalCode})` : 'took too long'} before: ${what}\n${this.stderr}\n${this.stdout}`);
			}

			await sleep(5);
		}
	}

	async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<number | null> {
		if (!this.hasEnded) {
			this.child.kill(signal);
		}

		return this.ended;
	}
}

export async function eventually(what: string, test: () => boolean | Promise<boolean>, timeoutMs = 30_000): Promise<void> {
	const deadline = Date.now() + timeoutMs;
	while (!await test()) {
		if (Date.now() > deadline) {
			throw new Error(`did not happen in ${timeoutMs} ms: ${what}`);
		}

		await sleep(10);
	}
}
