/** The image, run by podman and runc as the manifests say, in a world of its own. */
import {existsSync, mkdirSync, readFileSync} from 'node:fs';
import path from 'node:path';
import type {ExecutionContext} from 'ava';
import {findCgroup2} from '../../src/loader/host.js';
import {Cluster, NODE} from '../helpers/cluster.js';
import {Running, eventually, run, type Result} from '../helpers/process.js';
import {ROOT, podTemplate, type Overlay, type PodTemplate} from './rendered.js';

const IMAGE = 'localhost/sidestep:test';
const PODMAN = ['--root', path.join(ROOT, '.cache/image/store'), '--runroot', path.join(ROOT, '.cache/image/run'), '--runtime', 'runc', '--cgroup-manager', 'cgroupfs'];
const SERVICE_ACCOUNT = '/var/run/secrets/kubernetes.io/serviceaccount';

export function podman(...args: readonly string[]): Result {
	return run('podman', [...PODMAN, ...args]);
}

export interface Changes {
	readonly without?: string;
	/** Host paths of the manifests that are something else than the world's own. */
	readonly hostPaths?: Readonly<Record<string, string>>;
	/** @default the manifest's */
	readonly args?: readonly string[];
}

/** A node whose only container is the agent's. Its network namespace is the world's node. */
export class NodeWorld {
	readonly template: PodTemplate;
	readonly #paths: Readonly<Record<string, string>>;
	#containers = 0;

	private constructor(readonly cluster: Cluster, readonly overlay: Overlay) {
		const {world} = cluster;
		const own = (name: string) => {
			const directory = path.join(world.directory, name);
			mkdirSync(directory, {recursive: true});
			return directory;
		};

		this.template = podTemplate(overlay);
		// The machine's own for what cannot be another's, and is only looked at.
		this.#paths = {
			'/proc': '/proc', '/sys/fs/cgroup': findCgroup2()!, '/run/netns': '/run/netns', '/sys/fs/bpf': world.bpffs,
			'/opt/cni/bin': own('cni-bin'), '/etc/cni/net.d': own('cni-conf'), '/var/run/sidestep': own('run'), '/var/run/ztunnel': own('zds'),
		};
	}

	static async create(t: ExecutionContext, overlay: Overlay): Promise<NodeWorld> {
		sweep();
		const cluster = await Cluster.create(t, {token: 'good', inNode: true});
		const node = new NodeWorld(cluster, overlay);
		const account = path.join(cluster.world.directory, 'account');
		mkdirSync(account);
		cluster.api.writeCredentials(account);
		return node;
	}

	hostPath(name: string): string {
		const found = this.#paths[name];
		if (found === undefined) {
			throw new Error(`the manifests mount ${name}, for which the test has no place`);
		}

		return found;
	}

	start(changes: Changes = {}): ContainerAgent {
		const {world} = this.cluster;
		const name = `${world.id}-agent${++this.#containers}`;
		const running = Running.start(world.program('in'), ['--cgroup', world.cgroup, '--', 'podman', ...PODMAN, 'run', '--rm', '--name', name, ...this.#options(changes), IMAGE, ...changes.args ?? this.template.containers[0].args]);
		world.onEnd(async () => {
			podman('rm', '--force', '--time', '0', '--ignore', name);
			await running.stop('SIGKILL');
		});
		return new ContainerAgent(this, name, running);
	}

	#options({without, hostPaths = {}}: Changes): readonly string[] {
		const {hostNetwork, hostPID = false, containers: [{env, securityContext, volumeMounts}], volumes} = this.template;
		const {capabilities, runAsUser, runAsGroup, readOnlyRootFilesystem, privileged = false, seccompProfile} = securityContext;
		if (!hostNetwork || hostPID || privileged || capabilities.drop.join() !== 'ALL' || seccompProfile.type !== 'RuntimeDefault') {
			throw new Error('the manifests say what the test does not know how to do');
		}

		const {world, api} = this.cluster;
		const variable = ({name, value, valueFrom}: typeof env[number]) => {
			if (value === undefined && valueFrom?.fieldRef?.fieldPath !== 'spec.nodeName') {
				throw new Error(`the test does not know the value of ${name}`);
			}

			// Programs are attached to the world's part of the node's cgroups.
			return `${name}=${value ?? NODE}${name === 'SIDESTEP_CGROUP' ? `/${world.id}` : ''}`;
		};

		const mount = ({name, mountPath, readOnly, mountPropagation}: typeof volumeMounts[number]) => {
			const {hostPath} = volumes.find(volume => volume.name === name)!;
			const propagation = {HostToContainer: 'rslave', Bidirectional: 'rshared', None: 'rprivate'}[mountPropagation ?? 'None'];
			return `${hostPaths[hostPath.path] ?? this.hostPath(hostPath.path)}:${mountPath}:${readOnly ? 'ro' : 'rw'},${propagation}`;
		};

		return [
			'--network', `ns:${world.node.netns}`, '--user', `${runAsUser}:${runAsGroup}`, ...(readOnlyRootFilesystem ? ['--read-only', '--read-only-tmpfs=false'] : []),
			'--cap-drop', 'all', ...capabilities.add.filter(capability => capability !== without).flatMap(capability => ['--cap-add', capability]),
			// Machines like those of CI cannot raise them, which is podman's default.
			'--ulimit', 'nofile=1024:1024', '--ulimit', 'nproc=1000:1000',
			...env.flatMap(entry => ['--env', variable(entry)]), ...volumeMounts.flatMap(entry => ['--volume', mount(entry)]),
			// What a kubelet adds.
			'--env', 'KUBERNETES_SERVICE_HOST=127.0.0.1', '--env', `KUBERNETES_SERVICE_PORT=${new URL(api.url).port}`,
			'--volume', `${path.join(world.directory, 'account')}:${SERVICE_ACCOUNT}:ro`,
		];
	}
}

/** Takes away containers of test runs that were killed: names carry the pid. */
function sweep(): void {
	for (const name of podman('ps', '--all', '--format', '{{.Names}}').stdout.split('\n')) {
		const pid = /^sst-(\d+)-/.exec(name)?.[1];
		if (pid !== undefined && !existsSync(`/proc/${pid}`)) {
			podman('rm', '--force', '--time', '0', '--ignore', name);
		}
	}
}

export class ContainerAgent {
	constructor(readonly node: NodeWorld, readonly name: string, readonly running: Running) {}

	/** Of the agent's process. */
	get pid(): number {
		return Number(podman('inspect', '--format', '{{.State.Pid}}', this.name).stdout);
	}

	/** As a kubelet probes: from the node's namespace. */
	probe(page: string): Result {
		const {ports: [port]} = this.node.template.containers[0];
		return this.node.cluster.world.node.run(['curl', '-s', '--fail-with-body', '--max-time', '10', `http://127.0.0.1:${port!.containerPort}${page}`]);
	}

	async ready(): Promise<void> {
		const {readinessProbe} = this.node.template.containers[0];
		await eventually('the agent is ready', () => {
			if (this.running.hasEnded) {
				throw new Error(`the container ended: ${this.running.stderr}`);
			}

			return this.probe(readinessProbe.httpGet.path).code === 0;
		}, 60_000).catch((error: unknown) => {
			throw new Error(`${String(error)}\n${this.probe(readinessProbe.httpGet.path).stdout}\n${this.running.stderr}`);
		});
	}

	/** @returns the exit code, once it has ended by itself. */
	async ended(): Promise<number | null> {
		await eventually(`the container ends\n${this.running.stderr}`, () => this.running.hasEnded);
		return this.running.ended;
	}

	/** `kubectl exec … -- sidestep …` */
	exec(...args: readonly string[]): Result {
		return podman('exec', this.name, 'sidestep', ...args);
	}

	async says(pattern: RegExp): Promise<void> {
		await this.running.until(`log line ${String(pattern)}`, () => pattern.test(this.running.stderr));
	}

	/** Names as in /proc/PID/status. */
	status(field: string): string {
		return new RegExp(`^${field}:\\s*(.*)$`, 'm').exec(readFileSync(`/proc/${this.pid}/status`, 'utf8'))![1]!;
	}
}
