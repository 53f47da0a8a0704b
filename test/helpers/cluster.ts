/**
A world whose agent follows a cluster: the fake API server, pods in namespaces with processes in cgroups as a kubelet makes them.
*/
import {randomUUID} from 'node:crypto';
import {mkdirSync, rmdirSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import {hasErrno} from '../../src/errors.js';
import {netconf, plugin, type PluginResult} from '../cni/plugin.js';
import {FakeApiServer, makeNamespace, makePod, type ApiObject, type FakeApiServerOptions} from '../kubernetes/fake-server.js';
import {Agent, CLI, World, type Pod} from './world.js';
import {Running, eventually} from './process.js';

export const NODE = 'node-1';
export const REDIRECTION = 'ambient.istio.io/redirection';
export const AMBIENT = {'istio.io/dataplane-mode': 'ambient'};

/** The file of the node's only CNI network. */
export const NETWORK = '10-net.conflist';

/** How a kubelet and its runtime name a container's cgroup. */
export const CGROUP_DRIVERS = {
	cgroupfs: (uid: string, container: string) => `kubepods/burstable/pod${uid}/${container}`,
	systemd: (uid: string, container: string) => `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod${uid.replaceAll('-', '_')}.slice/cri-containerd-${container}.scope`,
	crio: (uid: string, container: string) => `kubepods.slice/kubepods-pod${uid.replaceAll('-', '_')}.slice/crio-${container}.scope`,
} as const;
export type CgroupDriver = keyof typeof CGROUP_DRIVERS;

export interface ClusterPod {
	/** namespace/name. */
	readonly key: string;
	readonly uid: string;
	readonly pod: Pod;
	/** Its first container's process. */
	readonly first?: Running;
}

export class Cluster {
	/** A command that runs the agent's. */
	enter: readonly string[] = [];
	#containers = 0;

	private constructor(readonly world: World, readonly api: FakeApiServer) {}

	/** @param options - `inNode`: the API server is where the world's node is, not in the machine's own namespace. */
	static async create(t: {teardown(clean: () => void | Promise<void>): void}, {inNode = false, ...options}: FakeApiServerOptions & {readonly inNode?: boolean} = {}): Promise<Cluster> {
		const world = World.create(t);
		const api = await FakeApiServer.start({bookmarkMs: 1000, ...(inNode ? {netns: world.node.netns} : {}), ...options});
		world.onEnd(async () => api.stop());
		for (const directory of ['cni-bin', 'cni-conf', 'run']) {
			mkdirSync(path.join(world.directory, directory));
		}

		writeFileSync(path.join(world.directory, 'cni-conf', NETWORK), JSON.stringify({cniVersion: '1.0.0', name: 'net', plugins: [{type: 'bridge'}]}));
		return new Cluster(world, api);
	}

	get zdsSocket(): string {
		return path.join(this.world.directory, 'run/ztunnel.sock');
	}

	get cniSocket(): string {
		return path.join(this.world.directory, 'run/cni.sock');
	}

	/** The agent's arguments. */
	arguments(extra: readonly string[] = []): readonly string[] {
		const {world} = this;
		const {server, tokenFile, caFile} = this.api.writeCredentials(world.directory);
		return [
			'run', '--node', NODE, '--api-server', server, '--token-file', tokenFile, ...(caFile === undefined ? [] : ['--ca-file', caFile]),
			'--zds-socket', this.zdsSocket, '--cni-socket', this.cniSocket, '--cni-bin', path.join(world.directory, 'cni-bin'), '--cni-conf', path.join(world.directory, 'cni-conf'),
			'--bpffs', world.bpffs, '--cgroup', world.cgroup, '--node-netns', world.node.netns, '--metrics-address', '127.0.0.1:0', ...extra,
		];
	}

	/** An agent that has heard of everything. Without a CNI plugin unless `extra` has `--cni`, which is not handed on. */
	async agent(extra: readonly string[] = []): Promise<Agent> {
		const agent = this.startAgent(extra);
		await agent.ready();
		return agent;
	}

	startAgent(extra: readonly string[] = []): Agent {
		const {world} = this;
		const rest = extra.filter(word => word !== '--cni');
		const running = Running.start(world.program('in'), ['--cgroup', world.cgroup, '--', ...this.enter, process.execPath, CLI, ...this.arguments(rest.length < extra.length ? rest : [...rest, '--no-cni'])]);
		world.onEnd(async () => {
			await running.stop('SIGKILL');
		});
		return new Agent(running);
	}

	/** A namespace of the cluster. */
	namespace(name: string, labels: Record<string, string> = {}): void {
		this.api.put('namespaces', makeNamespace(name, labels));
	}

	/** A pod that runs: its network, a process in its cgroup, and its object. */
	async pod(key: string, options: Parameters<typeof makePod>[1] & {readonly driver?: CgroupDriver} = {}): Promise<ClusterPod> {
		const pod = this.world.pod(key.replace('/', '-'));
		const uid = options.uid ?? randomUUID();
		const made = {key, uid, pod, first: await this.container({pod, uid}, options.driver)};
		this.put(made, options);
		return made;
	}

	/** Its object, as a kubelet has reported it. */
	put({key, uid, pod}: ClusterPod, options: Parameters<typeof makePod>[1] = {}): void {
		this.api.put('pods', makePod(key, {uid, ips: [pod.ipv4, pod.ipv6].filter(Boolean), nodeName: NODE, ...options}));
	}

	/** One more process of the pod, in a cgroup of its own. */
	async container({pod, uid}: Pick<ClusterPod, 'pod' | 'uid'>, driver: CgroupDriver = 'cgroupfs'): Promise<Running> {
		const cgroup = this.#cgroup(driver, uid);
		return Cluster.#started(pod.start(['sh', '-c', 'echo started; exec sleep 1000'], {cgroup}));
	}

	/** A process of the machine's own namespace in a pod's cgroup. */
	async hostProcess(uid: string): Promise<Running> {
		const cgroup = this.#cgroup('cgroupfs', uid);
		const running = Running.start(this.world.program('in'), ['--cgroup', cgroup, '--', 'sh', '-c', 'echo started; exec sleep 1000']);
		this.world.onEnd(async () => {
			await running.stop('SIGKILL');
		});
		return Cluster.#started(running);
	}

	/** Makes a container's cgroup, which goes with the world. */
	#cgroup(driver: CgroupDriver, uid: string): string {
		const {world} = this;
		const below = CGROUP_DRIVERS[driver](uid, `c${++this.#containers}`);
		mkdirSync(path.join(world.cgroup, below), {recursive: true});
		world.onEnd(async () => eventually(`the cgroup ${below} is empty`, () => {
			try {
				for (let directory = below; directory !== '.'; directory = path.dirname(directory)) {
					rmdirSync(path.join(world.cgroup, directory));
				}

				return true;
			} catch (error) {
				// Other pods are below it; or it has gone with one of them.
				return hasErrno(error, 'ENOTEMPTY', 'ENOENT');
			}
		}));
		return path.join(world.cgroup, below);
	}

	static async #started(running: Running): Promise<Running> {
		await running.until('it runs', () => running.stdout.includes('started'));
		return running;
	}

	/** The stand-in for ztunnel, in the node's namespace; it may not be connected yet. */
	ztunnel(options: readonly string[] = []): Running {
		return this.world.node.start([this.world.program('ztunnel'), '--zds', this.zdsSocket, '--retry', '200', ...options]);
	}

	/** The CNI plugin, as a runtime calls it for a pod whose namespace is made. */
	async cni(command: 'ADD' | 'CHECK' | 'DEL', {key, uid, pod}: Pick<ClusterPod, 'key' | 'uid' | 'pod'>, {timeoutSeconds = 60, containerId = 'c0ffee'}: {readonly timeoutSeconds?: number; readonly containerId?: string} = {}): Promise<PluginResult> {
		const [namespace, name] = key.split('/');
		const ips = [[pod.ipv4, 24], [pod.ipv6, 64]].filter(([ip]) => ip).map(([ip, bits]) => ({address: `${ip}/${bits}`}));
		return plugin(netconf(this.cniSocket, `"timeoutSeconds":${timeoutSeconds}`, JSON.stringify({cniVersion: '1.0.0', ips})), {
			CNI_COMMAND: command, CNI_CONTAINERID: containerId, CNI_NETNS: pod.netns, CNI_ARGS: `K8S_POD_NAMESPACE=${namespace};K8S_POD_NAME=${name};K8S_POD_INFRA_CONTAINER_ID=${containerId};K8S_POD_UID=${uid}`,
		});
	}

	object(key: string): ApiObject | undefined {
		return this.api.get('pods', key);
	}

	redirection(key: string): string | undefined {
		return this.object(key)?.metadata.annotations?.[REDIRECTION];
	}

	/** Names of the pods that the kernel captures. */
	enrolled(): readonly string[] {
		return this.world.json<ReadonlyArray<{readonly name: string}>>('pods').map(({name}) => name).sort();
	}
}
